// Unpacks plotly.js and the figures, draws them, and draws them again in the colours of the theme.
"use strict";

const root = document.documentElement;
const button = document.getElementById("theme");
const darkOf = JSON.parse(document.getElementById("dark-of").textContent);
const PRINTED_PX = 640; // of a page of A4 or letter without its margins

let figures = {};

async function unpacked(id) {
  const packed = atob(document.getElementById(id).textContent.trim());
  const bytes = Uint8Array.from(packed, (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

// Every colour of a figure stands for one thing, so each text that is one can be swapped.
function inTheme(value, isDark) {
  if (typeof value === "string") return (isDark && darkOf[value]) || value;
  if (Array.isArray(value)) return value.map((item) => inTheme(item, isDark));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(
    Object.entries(value).map(([name, item]) => [
      name, name === "customdata" || name === "z" ? item : inTheme(item, isDark),
    ])
  );
}

function draw(isDark, width) {
  const config = { displayModeBar: false, responsive: width === undefined };
  return Promise.all(
    Object.entries(figures).map(([id, figure]) => {
      const shown = inTheme(figure, isDark);
      shown.layout.width = width;
      return Plotly.react(id, shown.data, shown.layout, config);
    })
  );
}

function show(theme) {
  root.dataset.theme = theme;
  button.textContent = theme === "dark" ? "Light" : "Dark";
  return draw(theme === "dark");
}

async function start() {
  const preference = matchMedia("(prefers-color-scheme: dark)");
  root.dataset.theme = preference.matches ? "dark" : "light";
  const script = document.createElement("script");
  script.textContent = await unpacked("plotly");
  document.head.append(script);
  figures = JSON.parse(await unpacked("figures"));
  await show(root.dataset.theme);
  button.addEventListener("click", () => show(root.dataset.theme === "dark" ? "light" : "dark"));
  preference.addEventListener("change", (event) => show(event.matches ? "dark" : "light"));
  // Paper is light and narrow.
  let before = "light";
  addEventListener("beforeprint", () => {
    before = root.dataset.theme;
    root.dataset.theme = "light";
    draw(false, PRINTED_PX);
  });
  addEventListener("afterprint", () => show(before));
  root.dataset.drawn = "true";
}

start().catch((error) => {
  const failure = document.getElementById("failure");
  failure.textContent = `The figures could not be drawn (${error}); a browser of 2023 or later can.`;
  failure.hidden = false;
});

// The page: reads the controls, asks for the plan, shows it. Only the answer to the newest question
// is drawn; what else was solved stays as points of the curve.

import { makeAsker } from "/asker.js";
import { counted, drawBars, drawCurve, drawMap, makeViews } from "/charts.js";

const DEBOUNCE_MS = 50;
const SWEEP_BUDGETS = 24;
const NUMBER = /^\d{1,9}(\.\d{1,6})?$/;
const GRANULARITIES = {
  block: "block: each matrix alone",
  expert: "expert: its matrices",
  projection: "projection: of all experts",
  layer: "layer: all its experts",
};

const element = (id) => document.getElementById(id);
const facts = JSON.parse(element("facts").textContent);
const views = makeViews(facts);
const points = new Map(); // series -> its solved budgets
const asker = makeAsker(onAnswer, (message) => say(message));
let current = null; // { query, bits, rules }: what the controls say
let shown = null; // the plan on the page
let isPossible = true; // whether there is a plan for what the controls say; else the last one pales
let timer;

start();

function start() {
  element("model").textContent = facts.model;
  element("about").textContent =
    `${counted(facts.blocks.name.length, "block")}, ${counted(facts.schemes.length, "scheme")}, ` +
    `${count(facts.weights)} weights, ${counted(facts.calibrationTokens, "calibration token")}`;
  fill(element("granularity"), facts.granularities, (name) => GRANULARITIES[name] ?? name);
  fill(element("view"), views.map((view) => view.name), (name) => name);
  fillEngines();
  element("engine-row").hidden = facts.engines.length === 0;
  const { least, most } = facts.bits;
  Object.assign(element("slider"), { min: least, max: most });
  element("least").textContent = least.toFixed(2);
  element("most").textContent = most.toFixed(2);
  element("latency-row").hidden = element("latency-tile").hidden = facts.device === null;
  if (facts.device !== null) element("latency-source").textContent = facts.latencySource;
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  readAddress();
  listen();
  change();
}

function fill(select, values, label) {
  select.replaceChildren(...values.map((value) => new Option(label(value), value)));
}

/** Engines that can read no plan of this table cannot be chosen; the reasons are below and at each. */
function fillEngines() {
  const refused = facts.engines.filter(({ refusal }) => refusal !== null);
  fill(element("engine"), ["", ...facts.engines.map(({ name }) => name)], (name) => name || "none");
  for (const { name, refusal } of refused) {
    const option = [...element("engine").options].find(({ value }) => value === name);
    Object.assign(option, { disabled: true, title: refusal });
  }
  element("refused").hidden = refused.length === 0;
  const names = refused.map(({ name }) => name).join(", ");
  element("refused").querySelector("summary").textContent = `No plan for ${names}: why`;
  element("refused").querySelector("ul").replaceChildren(...refused.map(({ refusal }) => item(refusal)));
}

function item(text) {
  const entry = document.createElement("li");
  entry.textContent = text;
  return entry;
}

function listen() {
  element("slider").addEventListener("input", () => setBits(Number(element("slider").value)));
  element("bits").addEventListener("input", () => {
    const text = element("bits").value.trim().replace(",", ".");
    if (NUMBER.test(text)) element("slider").value = text;
    change();
  });
  for (const id of ["granularity", "engine", "tie-gate-up"]) element(id).addEventListener("change", change);
  for (const id of ["floor-bits", "max-latency", "tp"]) element(id).addEventListener("input", change);
  for (const id of ["view", "sort"]) element(id).addEventListener("change", drawShownMap);
  element("copy").addEventListener("click", copyCommand);
  element("theme").addEventListener("click", toggleTheme);
  element("controls").addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("keydown", onKey);
  addEventListener("hashchange", () => {
    readAddress();
    change();
  });
}

function onKey(event) {
  const isTyping = event.target.matches?.('input[type="text"], select');
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  const step = { "[": -0.05, "]": 0.05 }[event.key];
  const action = { g: () => advance("granularity"), m: () => advance("view"), c: copyCommand, t: toggleTheme }[event.key];
  if (step !== undefined) setBits(Number(element("slider").value) + step);
  if (action) action();
}

function advance(id) {
  const select = element(id);
  select.selectedIndex = (select.selectedIndex + 1) % select.options.length;
  select.dispatchEvent(new Event("change"));
}

function setBits(bits) {
  const { least, most } = facts.bits;
  const text = Math.min(Math.max(bits, least), most).toFixed(2);
  element("slider").value = text;
  element("bits").value = text;
  change();
}

/** The controls were touched: ask once they rest. */
function change() {
  clearTimeout(timer);
  timer = setTimeout(askNow, DEBOUNCE_MS);
}

function askNow() {
  const read = readControls();
  current = read;
  if (read === null) return;
  say("");
  history.replaceState(null, "", `#${read.query}`);
  element("bytes").textContent = bytes((Number(read.bits) * facts.weights) / 8);
  const rulesets = hasRules(read.rules) ? [read.rules, {}] : [read.rules];
  const later = rulesets.flatMap((rules) =>
    sweep(Number(rules["floor-bits"] ?? 0)).map((budget) => spell(budget, rules)),
  );
  const answer = asker.answers.get(read.query);
  element("plan").classList.toggle("waiting", answer === undefined);
  if (answer !== undefined) draw(answer);
  asker.want(rulesets.map((rules) => spell(read.bits, rules)), later);
}

/** The question that the controls ask; null where a number is not one, which is said. */
function readControls() {
  const ranks = element("tp").value.trim();
  if (!/^([1-9]\d{0,5})?$/.test(ranks)) {
    say(`"${ranks}" is not a number of ranks.`);
    return null;
  }
  const numbers = {};
  for (const id of ["bits", "floor-bits", "max-latency"]) {
    const text = element(id).value.trim().replace(",", ".");
    const isWrong = text === "" ? id === "bits" : !NUMBER.test(text);
    element(id).setAttribute("aria-invalid", String(isWrong));
    if (isWrong) {
      say(`"${text}" is not a number of at most 6 decimals.`);
      return null;
    }
    numbers[id] = text;
  }
  if (Number(numbers["floor-bits"]) > Number(numbers.bits)) {
    say("The least mean bits of every layer are above the budget.");
    return null;
  }
  const rules = {
    engine: element("engine").value,
    tp: element("engine").value === "" || ranks === "1" ? "" : ranks,
    granularity: element("granularity").value === "block" ? "" : element("granularity").value,
    "tie-gate-up": element("tie-gate-up").checked ? "1" : "",
    "floor-bits": numbers["floor-bits"],
    "max-latency": numbers["max-latency"],
  };
  const given = Object.fromEntries(Object.entries(rules).filter(([, value]) => value !== ""));
  return { query: spell(numbers.bits, given), bits: numbers.bits, rules: given };
}

function readAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const bits = asked.get("bits") ?? facts.bits.start.toFixed(2);
  element("bits").value = bits;
  element("slider").value = bits;
  element("granularity").value = asked.get("granularity") ?? "block";
  if (element("granularity").value === "") element("granularity").value = "block";
  element("engine").value = asked.get("engine") ?? "";
  element("tie-gate-up").checked = asked.get("tie-gate-up") === "1";
  for (const id of ["floor-bits", "max-latency", "tp"]) element(id).value = asked.get(id) ?? "";
}

/** The query of a question; one budget has one spelling, so that no answer is asked for twice. */
function spell(bits, rules) {
  return new URLSearchParams({ bits: String(Number(bits)), ...rules }).toString();
}

function hasRules(rules) {
  return Object.keys(rules).length > 0;
}

/** Budgets of the curve, evenly apart in proportion: a few of them first, then those between. */
function sweep(floor) {
  const { least, most } = { ...facts.bits, least: Math.max(facts.bits.least, floor) };
  const budgets = [];
  for (const stride of [8, 4, 2, 1]) {
    for (let index = 0; index <= SWEEP_BUDGETS; index += stride) {
      const budget = least * (most / least) ** (index / SWEEP_BUDGETS);
      const rounded = Math.min(Math.max(budget, least), most).toFixed(2);
      if (!budgets.includes(rounded)) budgets.push(rounded);
    }
  }
  return budgets;
}

function onAnswer(query, answer) {
  remember(query, answer);
  if (current === null) return;
  if (query === current.query) draw(answer);
  else if (query === freeQuery()) showFree();
  showCurve();
}

function remember(query, answer) {
  if (answer.impossible !== undefined) return;
  const asked = new URLSearchParams(query);
  asked.delete("bits");
  const series = asked.toString();
  if (!points.has(series)) points.set(series, []);
  points.get(series).push({ bits: answer.bits, loss: answer.loss, asked: answer.asked });
}

function draw(answer) {
  isPossible = answer.impossible === undefined;
  element("plan").classList.remove("waiting");
  element("plan").classList.toggle("none", !isPossible);
  if (isPossible) {
    shown = answer;
    showTiles(answer);
    showFree();
    drawShownMap();
    drawBars(element("bars"), facts, answer);
  } else say(answer.impossible);
  showCurve();
}

function showTiles(plan) {
  const gap = plan.bound === null || plan.loss <= plan.bound ? 0 : (plan.loss - plan.bound) / plan.loss;
  element("loss").textContent = number(plan.loss);
  element("proof").textContent = plan.proven
    ? `${facts.unit}; at most ${percent(gap)} above the best plan`
    : `${facts.unit}; not proven in time: up to ${plan.bound === null ? "any amount" : percent(gap)} above the best`;
  showUniform(plan);
  element("stored").textContent = bytes(plan.bytes);
  element("stored-about").textContent =
    `${plan.bits.toFixed(4)} bits of ${plan.asked} asked; ${((100 * plan.bits) / 16).toFixed(1)} % of 16-bit weights`;
  element("time").textContent = `${Math.round(1000 * plan.seconds).toLocaleString("en")} ms`;
  element("time-about").textContent = `${counted(plan.groups, "choice")} of ${counted(facts.schemes.length, "scheme")}`;
  if (plan.latencyUs !== null) {
    element("latency").textContent = `${(plan.latencyUs / 1000).toPrecision(4)} ms`;
    element("latency-about").textContent = `${facts.device}, ${counted(facts.tokens, "token")}; a prediction`;
  }
  element("command").textContent = plan.command;
  element("command-about").textContent = plan.proven
    ? "Writes this plan to the work folder; mxq pack makes its checkpoint."
    : "The page stopped its solver early; the command looks longer and may find a better plan.";
}

function showUniform(plan) {
  const uniform = plan.uniform;
  element("uniform").textContent = uniform === null ? "-" : number(uniform.loss);
  if (uniform === null) {
    element("uniform-about").textContent =
      current.rules["floor-bits"] === undefined ? "none fits in this budget" : "not compared under a floor";
    return;
  }
  const words = `${uniform.scheme}, ${uniform.bits.toFixed(3)} bits: loses `;
  compare(element("uniform-about"), [words, uniform.loss, plan.loss], "good");
}

/** The plan of the same budget with no rule set, if it is there. */
function showFree() {
  if (shown === null || !isPossible) return;
  const free = hasRules(current.rules) ? asker.answers.get(freeQuery()) : shown;
  const isKnown = free !== undefined && free.impossible === undefined;
  element("free").textContent = isKnown ? number(free.loss) : "...";
  if (!hasRules(current.rules)) element("free-about").textContent = "no rule is set";
  else if (isKnown) compare(element("free-about"), ["this plan loses ", shown.loss, free.loss], "bad");
  else element("free-about").textContent = "";
}

function freeQuery() {
  return spell(current.bits, {});
}

/** `[words, one, other]`: how much more the one loss is than the other. */
function compare(place, [words, one, other], name) {
  const ratio = one / other;
  if (!Number.isFinite(ratio)) place.textContent = one === other ? "both lose nothing" : "the other loses nothing";
  else if (ratio < 1.0001) place.textContent = `${words}no more`; // losses are proven to a gap of 1e-4
  else if (ratio < 1.995) place.replaceChildren(words, strong(`${percent(ratio - 1)} more`, name));
  else place.replaceChildren(words, strong(`${ratio.toPrecision(3)} times`, name), " as much");
}

function strong(text, name) {
  const mark = document.createElement("span");
  mark.className = name;
  mark.textContent = text;
  return mark;
}

function drawShownMap() {
  const view = views[element("view").selectedIndex];
  element("sort-row").hidden = view.axis !== "expert";
  if (shown !== null) drawMap(element("map"), facts, view, shown, element("sort").checked);
}

let isWired = false;

function showCurve() {
  const now = new URLSearchParams(current.rules).toString();
  const series = [...points]
    .filter(([name, solved]) => name === now || solved.length > 3)
    .map(([name, solved]) => ({ name: name === "" ? "no rules" : spokenRules(name), points: solved, isNow: name === now }));
  const left = asker.left();
  element("filling").textContent = left > 0 ? `${counted(left, "budget")} to go` : "click a point to go there";
  drawCurve(element("curve"), facts, series, isPossible ? shown : null);
  if (!isWired) {
    isWired = true;
    element("curve").on("plotly_click", ({ points: [point] }) => {
      if (point.customdata !== undefined) setBits(point.customdata);
    });
  }
}

function spokenRules(series) {
  return [...new URLSearchParams(series)]
    .map(([name, value]) => ({ granularity: value, engine: value, "tie-gate-up": "gate = up" })[name] ?? `${name} ${value}`)
    .join(", ");
}

function toggleTheme() {
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  drawShownMap();
  if (shown !== null) drawBars(element("bars"), facts, shown);
  if (current !== null) showCurve();
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  element("theme").textContent = name === "dark" ? "Light" : "Dark";
}

async function copyCommand() {
  if (shown === null || !isPossible) return;
  try {
    await navigator.clipboard.writeText(shown.command);
    element("copy").textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(element("command"));
    element("copy").textContent = "Selected";
  }
  setTimeout(() => (element("copy").textContent = "Copy"), 1500);
}

function say(message) {
  element("message").textContent = message;
}

function number(value) {
  if (value === 0) return "0";
  return value >= 1e-4 && value < 1e6 ? value.toPrecision(4) : value.toExponential(3);
}

function percent(share) {
  if (share === 0) return "0 %";
  return share < 1e-5 ? "0.001 %" : `${(100 * share).toPrecision(2)} %`;
}

function bytes(amount) {
  const [unit, name] = [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]].find(([size]) => amount >= size) ?? [1, "bytes"];
  return `${(amount / unit).toPrecision(4)} ${name}`;
}

function count(amount) {
  const [unit, name] = [[1e9, " billion"], [1e6, " million"]].find(([size]) => amount >= size) ?? [1, ""];
  return `${(amount / unit).toPrecision(3)}${name}`;
}

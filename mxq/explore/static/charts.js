// The three charts. Each function draws anew into its element; the facts of the table come first.

const VIRIDIS = [
  "#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21918c",
  "#22a884", "#44bf70", "#7ad151", "#bddf26", "#fde725",
];
const OTHERS = ["#d55e00", "#9a6fd0", "#2a9d63", "#d1608f", "#a8842c"];
const CONFIG = { displayModeBar: false, responsive: true };
const FONT = 'system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';

/** Every view of the map: experts of all or one projection, and projections. */
export function makeViews(facts) {
  const { layer, expert, projection, tokens } = facts.blocks;
  const all = layer.map((_, block) => block);
  const routed = all.filter((block) => expert[block] !== null);
  const views = [];
  if (routed.length > 0) {
    views.push(makeView("experts, all projections", routed, (block) => expert[block], "expert"));
    for (const name of unique(routed.map((block) => projection[block]))) {
      const some = routed.filter((block) => projection[block] === name);
      views.push(makeView(`experts, ${name}`, some, (block) => expert[block], "expert"));
    }
  }
  views.push(makeView("projections", all, (block) => projection[block], "projection"));
  return views;

  function makeView(name, blocks, columnOf, axis) {
    const columns = unique(blocks.map(columnOf));
    if (axis === "expert") columns.sort((a, b) => a - b);
    const rows = unique(blocks.map((block) => layer[block])).sort((a, b) => a - b);
    const place = new Map(columns.map((column, index) => [column, index]));
    const line = new Map(rows.map((row, index) => [row, index]));
    const cells = rows.map(() => columns.map(() => []));
    for (const block of blocks) cells[line.get(layer[block])][place.get(columnOf(block))].push(block);
    return { name, axis, rows, columns, cells, busy: (cell) => Math.max(...cell.map((b) => tokens[b]), 0) };
  }
}

/** Mean bits of each cell of a view; hover says what is in it. */
export function drawMap(element, facts, view, plan, isSorted) {
  const sorted = isSorted && view.axis === "expert";
  const cells = sorted
    ? view.cells.map((row) => [...row].sort((a, b) => view.busy(b) - view.busy(a)))
    : view.cells;
  const [low, high] = bitsRange(facts);
  element.style.height = `${Math.min(Math.max(view.rows.length * 13 + 70, 200), 420)}px`;
  const ticks = [2, 3, 4, 5, 6, 8, 12, 16].filter((bits) => bits >= low && bits <= high);
  const colours = theme();
  const trace = {
    type: "heatmap",
    x: view.columns.map((column, index) => (sorted ? String(index + 1) : String(column))),
    y: view.rows.map(String),
    z: cells.map((row) => row.map((cell) => (cell.length ? Math.log2(meanBits(facts, plan, cell)) : null))),
    hovertext: cells.map((row) => row.map((cell) => (cell.length ? describe(facts, view, plan, cell) : ""))),
    hoverinfo: "text",
    zmin: Math.log2(low),
    zmax: Math.log2(high),
    colorscale: VIRIDIS.map((colour, index) => [index / (VIRIDIS.length - 1), colour]),
    xgap: view.columns.length > 90 ? 0 : 1,
    ygap: view.rows.length > 60 ? 0 : 1,
    colorbar: {
      tickvals: ticks.map(Math.log2), ticktext: ticks.map(String), thickness: 12, outlinewidth: 0,
      title: { text: "bits", side: "top" },
    },
  };
  const across = sorted ? "experts of the layer, the one with most calibration tokens first" : view.axis;
  const layout = base(colours, { l: 48, r: 8, t: 6, b: 44 });
  layout.xaxis = { ...layout.xaxis, type: "category", title: { text: across }, showgrid: false, tickangle: 0, nticks: 30 };
  layout.yaxis = { ...layout.yaxis, type: "category", autorange: "reversed", title: { text: "layer" }, showgrid: false };
  return Plotly.react(element, [trace], layout, CONFIG);
}

/** Share of the weights in each scheme. */
export function drawBars(element, facts, plan) {
  const weights = facts.schemes.map(() => 0);
  const counts = facts.schemes.map(() => 0);
  plan.choice.forEach((scheme, block) => {
    weights[scheme] += facts.shapes[facts.blocks.shape[block]].weights;
    counts[scheme] += 1;
  });
  const bits = schemeBits(facts);
  const order = facts.schemes.map((_, scheme) => scheme).sort((a, b) => bits[b] - bits[a] || b - a);
  const shares = order.map((scheme) => (100 * weights[scheme]) / facts.weights);
  const colours = theme();
  const trace = {
    type: "bar",
    orientation: "h",
    y: order.map((scheme) => facts.schemes[scheme]),
    x: shares,
    text: order.map((scheme, index) => (counts[scheme] ? shareText(shares[index]) : "")),
    textposition: "outside",
    cliponaxis: false,
    hovertext: order.map(
      (scheme, index) =>
        `${facts.schemes[scheme]}: ${counted(counts[scheme], "block")}, ` +
        `${shareText(shares[index])} of the weights, ${bits[scheme].toFixed(2)} bits each`,
    ),
    hoverinfo: "text",
    marker: { color: order.map((scheme) => colourOf(facts, bits[scheme])), line: { width: 1, color: colours.line } },
  };
  const layout = base(colours, { l: 8, r: 56, t: 6, b: 36 });
  layout.xaxis = { ...layout.xaxis, ticksuffix: " %", range: [0, Math.max(25, ...shares) * 1.08] };
  layout.yaxis = { ...layout.yaxis, type: "category", automargin: true, showgrid: false };
  layout.bargap = 0.25;
  return Plotly.react(element, [trace], layout, CONFIG);
}

/** A percentage with a digit that means something; the little that is there is never "0.0 %". */
function shareText(share) {
  if (share === 0) return "0 %";
  return share < 0.05 ? "< 0.1 %" : `${share.toFixed(1)} %`;
}

/**
 * Loss against bits: each set of rules that was solved, the uniform plans, the plan of now.
 * `series` are { name, points: [{ bits, loss, asked }], isNow }; losses of 0 have no place on a
 * logarithmic axis and are left out.
 */
export function drawCurve(element, facts, series, plan) {
  const colours = theme();
  const traces = series.map(({ name, points, isNow }, index) => {
    const shown = points.filter((point) => point.loss > 0).sort((a, b) => a.bits - b.bits);
    return {
      type: "scatter",
      mode: isNow ? "lines+markers" : "lines",
      name,
      x: shown.map((point) => point.bits),
      y: shown.map((point) => point.loss),
      customdata: shown.map((point) => point.asked),
      line: { width: isNow ? 2.5 : 1.5, color: isNow ? colours.accent : OTHERS[index % OTHERS.length], dash: isNow ? "solid" : "dot" },
      marker: { size: 5 },
      hovertemplate: "%{x:.3f} bits, loss %{y:.4g}<extra>%{fullData.name}</extra>",
    };
  });
  const uniforms = facts.uniforms.filter((uniform) => uniform.loss > 0);
  traces.push({
    type: "scatter",
    mode: "markers",
    name: "uniform",
    x: uniforms.map((uniform) => uniform.bits),
    y: uniforms.map((uniform) => uniform.loss),
    text: uniforms.map((uniform) => uniform.scheme),
    marker: { symbol: "diamond-open", size: 9, color: colours.soft, line: { width: 2 } },
    hovertemplate: "uniform %{text}<br>%{x:.3f} bits, loss %{y:.4g}<extra></extra>",
  });
  if (plan && plan.loss > 0) {
    traces.push({
      type: "scatter",
      mode: "markers",
      name: "this plan",
      x: [plan.bits],
      y: [plan.loss],
      marker: { size: 14, color: "rgba(0,0,0,0)", line: { width: 3, color: colours.ink } },
      hovertemplate: "this plan<br>%{x:.3f} bits, loss %{y:.4g}<extra></extra>",
    });
  }
  const layout = base(colours, { l: 72, r: 12, t: 6, b: 44 });
  layout.xaxis = { ...layout.xaxis, title: { text: "bits per weight reached" } };
  layout.yaxis = { ...layout.yaxis, type: "log", exponentformat: "power", dtick: 1, title: { text: facts.unit } };
  layout.legend = { x: 1, y: 1, xanchor: "right", bgcolor: "rgba(0,0,0,0)" };
  layout.hovermode = "closest";
  return Plotly.react(element, traces, layout, CONFIG);
}

function base(colours, margin) {
  const axis = {
    gridcolor: colours.line, zeroline: false, linecolor: colours.line, fixedrange: true, ticks: "",
    title: { standoff: 8 },
  };
  return {
    margin,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: FONT, size: 12, color: colours.ink },
    hoverlabel: { align: "left", bgcolor: colours.panel, bordercolor: colours.line, font: { family: FONT, color: colours.ink } },
    xaxis: axis,
    yaxis: { ...axis },
  };
}

/** A count with its noun, in the plural unless it is 1. */
export function counted(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}

function theme() {
  const style = getComputedStyle(document.documentElement);
  const names = ["accent", "ink", "soft", "line", "panel"];
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

function unique(values) {
  return [...new Set(values)];
}

/** Stored bits per weight of each scheme, over all blocks. */
function schemeBits(facts) {
  const total = facts.schemes.map(() => 0);
  for (const shape of facts.blocks.shape) facts.shapes[shape].bits.forEach((bits, scheme) => (total[scheme] += bits));
  return total.map((bits) => bits / facts.weights);
}

function bitsRange(facts) {
  const bits = schemeBits(facts);
  return [Math.floor(Math.min(...bits)), Math.max(...bits)];
}

function colourOf(facts, bits) {
  const [low, high] = bitsRange(facts);
  const place = high > low ? Math.log2(bits / low) / Math.log2(high / low) : 0;
  return VIRIDIS[Math.round(Math.min(Math.max(place, 0), 1) * (VIRIDIS.length - 1))];
}

function meanBits(facts, plan, blocks) {
  let bits = 0;
  let weights = 0;
  for (const block of blocks) {
    const shape = facts.shapes[facts.blocks.shape[block]];
    bits += shape.bits[plan.choice[block]];
    weights += shape.weights;
  }
  return bits / weights;
}

function describe(facts, view, plan, blocks) {
  const { layer, expert, projection, tokens } = facts.blocks;
  const first = blocks[0];
  const share = blocks.reduce((sum, block) => sum + plan.losses[block], 0) / (plan.loss || 1);
  const end = `${meanBits(facts, plan, blocks).toFixed(2)} bits per weight, ${(100 * share).toPrecision(2)} % of the loss`;
  if (view.axis === "expert") {
    const lines = blocks.map((block) => `${escape(projection[block])} ${facts.schemes[plan.choice[block]]}`);
    const head = `layer ${layer[first]}, expert ${expert[first]}: ${counted(tokens[first], "token")}`;
    return [head, ...lines, end].join("<br>");
  }
  const counts = facts.schemes.map(() => 0);
  for (const block of blocks) counts[plan.choice[block]] += 1;
  const lines = facts.schemes
    .map((scheme, index) => [counts[index], scheme])
    .filter(([count]) => count > 0)
    .map(([count, scheme]) => (blocks.length > 1 ? `${count} x ${scheme}` : scheme));
  return [`layer ${layer[first]}, ${escape(projection[first])}`, ...lines, end].join("<br>");
}

/** Plotly reads a few tags in its texts; names of a model must not become any. */
function escape(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

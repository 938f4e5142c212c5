"use strict";
// Draws the figures of the page with Plotly, in the colours of the page's theme.

const LINES = ["#0072b2", "#d55e00", "#009e73", "#b0488a", "#3b9bd1", "#a87200", "#6b6b6b", "#8050b0"];
const LINES_ON_DARK = ["#5aaef0", "#ff8d4d", "#3fd0a0", "#e69bcb", "#9ad6f7", "#f2b84b", "#b8b8b8", "#bb9ae0"];
const dark = window.matchMedia("(prefers-color-scheme: dark)");

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function themed(chart) {
  const axis = {
    gridcolor: color("--grid"), zerolinecolor: color("--grid"), linecolor: color("--line"), automargin: true,
  };
  const text = { color: color("--text"), size: 12, family: getComputedStyle(document.body).fontFamily };
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", colorway: dark.matches ? LINES_ON_DARK : LINES, font: text, showlegend: false,
    margin: { l: 55, r: 20, t: 30, b: 42 },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, traceorder: "normal" },
    hovermode: "closest", hoverlabel: { namelength: -1 },
    ...chart.layout, height: chart.height,
  };
  for (const name of ["xaxis", "yaxis"]) layout[name] = { ...axis, ...layout[name] };
  if (layout.yaxis2) layout.yaxis2 = { ...axis, ...layout.yaxis2 };
  layout.shapes = (layout.shapes || []).map((shape) => (
    shape.type === "line" ? { ...shape, line: { color: color("--muted"), width: 1, ...shape.line } } : shape));
  const side = { x: 1.0, thickness: 14, outlinewidth: 0 };
  const data = chart.data.map((one) => (one.type === "heatmap" ? { colorbar: side, ...one } : one));
  return [data, layout];
}

// Draws the charts from the top of the page to its end; between two of them the browser can do other things.
async function draw(charts) {
  const config = { responsive: true, displayModeBar: false };
  for (const chart of charts) {
    const element = document.getElementById("chart-" + chart.name);
    if (element) await Plotly.react(element, ...themed(chart), config);
    document.documentElement.dataset.begun ??= performance.now();
    await new Promise((resume) => setTimeout(resume));
  }
  document.documentElement.dataset.drawn ??= performance.now();
}

// The charts of a report are in it; those of a live page come with its data.
const inside = document.getElementById("charts");
let shown = inside ? JSON.parse(inside.textContent) : [];
dark.addEventListener("change", () => draw(shown));
if (inside) draw(shown);

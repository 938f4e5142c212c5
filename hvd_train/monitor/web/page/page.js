"use strict";
// Fills the page from its data and renews it once a second, and only what has changed.
{
  const script = document.currentScript;
  const source = script.dataset.source;
  const scripts = new Promise((loaded) => document.addEventListener("DOMContentLoaded", loaded));
  let version = "";
  let parts = "";
  const status = document.getElementById("live");

  const renew = async () => {
    const address = source + (source.includes("?") ? "&" : "?") + "version=" + encodeURIComponent(version);
    try {
      const answer = await fetch(address, { credentials: "omit" });
      const data = await answer.json();
      say(answer.ok ? "" : data.problem);
      if (!answer.ok) return;
      version = data.version;
      if (data.parts !== undefined && data.parts !== parts) {
        parts = data.parts;
        keepingChoices(() => { document.getElementById("parts").innerHTML = parts; });
      }
      await scripts;
      if (data.charts) await replaceCharts(data.charts, data.frames);
    } catch (error) {
      say("the dashboard does not answer: is it still running?");
    }
    document.documentElement.dataset.renewed = Date.now();
  };
  const say = (text) => { if (status.textContent !== text) status.textContent = text; };
  const again = () => renew().finally(() => setTimeout(again, document.hidden ? 5000 : 1000));

  // Charts keep their elements, and with them what is zoomed, unless there are others.
  const replaceCharts = (charts, frames) => {
    const element = (chart) => document.getElementById("chart-" + chart.name);
    const figures = document.getElementById("figures");
    if (figures.querySelectorAll(".plot").length !== charts.length || !charts.every(element)) {
      for (const plot of figures.querySelectorAll(".plot")) Plotly.purge(plot);
      figures.innerHTML = frames;
    }
    for (const chart of charts) {
      element(chart).closest("figure").querySelector("h3").textContent = chart.title;
    }
    shown = charts;
    return draw(shown);
  };

  // The table of the runs: a filter by name, sorting by a column, and the runs that are chosen.
  let sorted = null;
  const rows = () => [...document.querySelectorAll("#runs tbody tr")];
  const filter = document.getElementById("filter");
  const arrange = () => {
    const wanted = filter ? filter.value.toLowerCase() : "";
    for (const row of rows()) row.hidden = !row.cells[1].textContent.toLowerCase().includes(wanted);
    if (!sorted) return;
    const key = (row) => row.cells[sorted.column].dataset.sort ?? row.cells[sorted.column].textContent.trim();
    const isNumber = (text) => text !== "" && !isNaN(text);
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return (isNumber(x) && isNumber(y) ? x - y : x.localeCompare(y)) * sorted.sign;
    };
    document.querySelector("#runs tbody").append(...rows().sort(compare));
    for (const button of document.querySelectorAll("#runs button[data-column]")) {
      const mine = Number(button.dataset.column) === sorted.column;
      button.closest("th").setAttribute("aria-sort", !mine ? "none" : sorted.sign > 0 ? "ascending" : "descending");
    }
  };
  // What has the focus, and what is chosen, survives a change.
  const keepingChoices = (change) => {
    const chosen = new Set([...document.querySelectorAll("#runs input:checked")].map((box) => box.value));
    const all = () => [...document.querySelectorAll("#parts a, #parts button, #parts input, #parts [tabindex]")];
    const named = (one) => one.value || one.href || one.textContent.slice(0, 40);
    const focus = all().includes(document.activeElement) ? named(document.activeElement) : null;
    const scrolled = [...document.querySelectorAll("#parts .scroll")].map((one) => one.scrollLeft);
    change();
    for (const box of document.querySelectorAll("#runs input")) box.checked = chosen.has(box.value);
    arrange();
    document.querySelectorAll("#parts .scroll").forEach((one, i) => { one.scrollLeft = scrolled[i] || 0; });
    if (focus !== null) all().find((one) => named(one) === focus)?.focus({ preventScroll: true });
  };
  again();
  document.addEventListener("click", (event) => {
    const column = Number(event.target.dataset && event.target.dataset.column);
    if (!column) return;
    sorted = { column, sign: sorted && sorted.column === column ? -sorted.sign : 1 };
    arrange();
  });
  if (filter) filter.addEventListener("input", arrange);
}

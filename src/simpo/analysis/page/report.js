"use strict";
// Draws the charts and lists the examples of a report. Data is inserted as text only, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const element = (tag, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  const shown = (value, share) => {
    if (typeof value !== "number") return String(value);
    if (share) return `${(100 * value).toFixed(1)}%`;
    const size = Math.abs(value);
    if (Number.isInteger(value) && size < 1e9) return value.toLocaleString("en");
    if (size && (size < 1e-3 || size >= 1e6)) return Number(value.toPrecision(3)).toExponential();
    return value.toLocaleString("en", { maximumSignificantDigits: 4 });
  };

  // ---- Theme.

  const button = document.getElementById("theme");
  const setTheme = (theme) => {
    root.dataset.theme = theme;
    button.textContent = theme === "dark" ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to ${button.textContent.toLowerCase()} colors`);
  };
  const system = matchMedia("(prefers-color-scheme: dark)");
  setTheme(system.matches ? "dark" : "light");
  system.addEventListener("change", () => { setTheme(system.matches ? "dark" : "light"); drawAll(); });
  button.addEventListener("click", () => { setTheme(root.dataset.theme === "dark" ? "light" : "dark"); drawAll(); });

  // ---- Charts.

  const DASHES = ["solid", "dashed", "dotted"];
  const SYMBOLS = ["circle", "triangle", "rect", "diamond"];

  // The metrics of a curve chart that were logged, in the order of charts.yaml; none for other charts.
  const metricsOf = (chart) =>
    Object.values(chart.keys || {}).filter((name) => chart.series.some((one) => one.metric === name));

  // The style of a curve. For a single run, color distinguishes metrics or, if there is only one, training from held-out
  // rows. For several runs, color distinguishes runs, and dashes metrics. Training curves are thin.
  const styled = (one, metrics) => {
    const thin = one.name === "training", metric = metrics.indexOf(one.metric), several = metrics.length > 1;
    const label = several ? `${one.metric}, ${one.name}` : one.name;
    if (data.runs.length === 1) return { ...one, name: label, label, thin, color: several ? metric : Number(!thin) };
    const run = data.runs.indexOf(one.run);
    return { ...one, name: one.run, label: `${one.run}, ${label}`, thin, color: run, dash: metric };
  };

  // Explains line styles in charts of several runs, where the legend only names the runs.
  const explained = (chart, metrics) => {
    const both = new Set(chart.series.map((one) => one.thin)).size > 1;
    const dashes = ["Solid", "dashed", "dotted"].slice(0, metrics.length).map((dash, k) => `${dash}: ${metrics[k]}`);
    const widths = both ? "Thin lines: training; thick lines: held out." : "";
    return [widths, metrics.length > 1 ? `${dashes.join("; ")}.` : ""].filter(Boolean).join(" ");
  };

  const addStyle = (plot) => {
    const chart = data.charts[plot.dataset.chart], metrics = metricsOf(chart);
    chart.series = chart.series.map((one, k) => (metrics.length ? styled(one, metrics) : { color: k, label: one.name, ...one }));
    const note = metrics.length && data.runs.length > 1 ? explained(chart, metrics) : "";
    if (!note) return;
    chart.note = `${chart.note} ${note}`.trim();
    plot.parentElement.querySelector("figcaption").append(element("p", { className: "note", textContent: note }));
  };
  document.querySelectorAll("[data-chart]").forEach(addStyle);

  const seriesOf = (chart, one, number) => {
    const color = css(`--c${one.color % 8}`);
    if (chart.kind === "points") {
      return [{ id: String(number), name: one.name, type: "scatter", data: one.data, symbol: SYMBOLS[number % 4], symbolSize: 5,
        itemStyle: { color, opacity: 0.55 } }];
    }
    const few = one.data.length <= 40 && !one.steps;
    const line = { id: String(number), name: one.name, type: "line", data: one.data, step: one.steps ? "middle" : false,
      showSymbol: one.data.length === 1 || (few && !one.thin), symbol: SYMBOLS[number % 4], symbolSize: 6, color,
      lineStyle: { width: one.thin ? 1.3 : 2.2, opacity: one.thin ? 0.75 : 1, type: DASHES[(one.dash || 0) % 3], color },
      areaStyle: one.steps ? { color, opacity: 0.12 } : undefined, emphasis: { disabled: true } };
    if (!one.bounds || !one.bounds.length) return [line];
    const bars = one.bounds.flatMap(([x, low, high]) => [[x, low], [x, high], [x, null]]);
    return [line, { name: one.name, type: "line", data: bars, showSymbol: false, silent: true, color, tooltip: { show: false },
      lineStyle: { width: 2, color, opacity: 0.6 }, emphasis: { disabled: true } }];
  };

  const marksOf = (chart) => {
    const lines = Object.entries(chart.marks || {}).map(([name, x]) => ({ xAxis: x, name, label: { formatter: name, position: "end" } }));
    if (chart.even !== undefined) lines.push({ yAxis: chart.even, label: { formatter: shown(chart.even, chart.y.share) } });
    if (chart.zero) lines.push({ yAxis: 0, label: { show: false } });
    if (chart.diagonal) lines.push([{ coord: [0.5, 0.5] }, { coord: [1, 1] }]);
    if (!lines.length) return [];
    return [{ type: "line", data: [], silent: true, markLine: { silent: true, symbol: "none", animation: false, data: lines,
      label: { color: css("--soft"), position: "insideEndTop" }, lineStyle: { color: css("--soft"), type: "dashed", width: 1 } } }];
  };

  const tooltipOf = (chart, found) => {
    const rows = (Array.isArray(found) ? found : [found]).filter((one) => chart.series[one.seriesId] && Array.isArray(one.value) && one.value[1] !== null);
    if (!rows.length) return "";
    const category = chart.x.categories && chart.x.categories[rows[0].value[0]];
    const box = element("div", {}, element("b", { textContent: `${chart.x.name}: ${category || shown(rows[0].value[0], chart.x.share)}` }));
    for (const row of rows) {
      const one = chart.series[row.seriesId];
      const bounds = (one.bounds || []).find(([x]) => x === row.value[0]);
      const interval = bounds ? ` [${shown(bounds[1], chart.y.share)}, ${shown(bounds[2], chart.y.share)}]` : "";
      box.append(element("div", { textContent: `${one.label}: ${shown(row.value[1], chart.y.share)}${interval}` }));
    }
    return box;
  };

  const optionOf = (chart, width) => {
    const soft = css("--soft"), grid = css("--line");
    const even = Boolean(chart.x.share || chart.x.whole || chart.x.name.endsWith("step"));  // whether the ends of the axis are round numbers
    const axis = { nameLocation: "middle", nameTextStyle: { color: soft }, axisLabel: { color: soft, hideOverlap: true },
      axisLine: { onZero: false, lineStyle: { color: soft } }, splitLine: { lineStyle: { color: grid } } };
    const x = { ...axis, type: chart.x.categories ? "category" : "value", data: chart.x.categories, name: chart.x.name, nameGap: chart.x.categories ? 48 : 28,
      min: chart.x.min ?? (chart.kind === "points" ? undefined : "dataMin"), max: chart.x.max ?? (chart.kind === "points" ? undefined : "dataMax"),
      minInterval: chart.x.whole ? 1 : undefined, splitLine: { show: false }, scale: true,
      axisLabel: { ...axis.axisLabel, showMinLabel: even, showMaxLabel: even, formatter: (value) => shown(value) } };
    if (chart.x.categories) Object.assign(x, { min: undefined, max: undefined, axisLabel: { ...axis.axisLabel, hideOverlap: false, rotate: 30, fontSize: 10 } });
    if (chart.x.share) x.axisLabel = { ...axis.axisLabel, formatter: (value) => `${Math.round(100 * value)}%` };
    const values = chart.series.flatMap((one) => [...one.data.map(([, value]) => value), ...(one.bounds || []).flatMap(([, low, high]) => [low, high])]);
    const lowest = values.reduce((a, b) => Math.min(a, b), Infinity), highest = values.reduce((a, b) => Math.max(a, b), -Infinity);
    const logarithmic = chart.y.log && lowest > 0 && highest / lowest > 50;
    const y = { ...axis, type: logarithmic ? "log" : "value", name: chart.y.name, nameGap: 46, scale: true,
      axisLabel: { ...axis.axisLabel, formatter: (value) => (chart.y.share ? `${Math.round(100 * value)}%` : shown(value)) } };
    if (chart.y.share && lowest >= 0 && highest <= 1) {
      const min = Math.floor(lowest * 10) / 10, max = Math.min(1, Math.max(min + 0.1, Math.ceil(highest * 10) / 10));
      Object.assign(y, { min, max, interval: max - min > 0.55 ? 0.2 : max - min > 0.25 ? 0.1 : 0.05 });
    }
    const legend = [...new Set(chart.series.map((one) => one.name))];
    const lines = legend.reduce(([count, used], name) => {  // estimates the legend's line breaks, at about 6.6 pixels per character
      const size = 42 + 6.6 * name.length;
      return used + size > width ? [count + 1, size] : [count, used + size];
    }, [1, 0])[0];
    const scrolls = lines > 4, rows = legend.length < 2 ? 0 : scrolls ? 1 : lines;
    return {
      animation: false, backgroundColor: "transparent", textStyle: { fontFamily: "system-ui, sans-serif", color: css("--ink") },
      aria: { enabled: true, label: { description: `${chart.title}. ${chart.note || ""}` } },
      grid: { left: 62, right: 18, top: 14 + 20 * rows + (chart.marks ? 12 : 0), bottom: chart.x.categories ? 66 : 44 },
      legend: { show: rows > 0, type: scrolls ? "scroll" : "plain", top: 0, itemGap: 8, itemHeight: 10, textStyle: { color: css("--ink") }, inactiveColor: soft,
        pageTextStyle: { color: soft }, data: legend },
      tooltip: { trigger: chart.kind === "points" ? "item" : "axis", confine: true, backgroundColor: css("--card"), borderColor: grid,
        textStyle: { color: css("--ink"), fontSize: 12 }, formatter: (found) => tooltipOf(chart, found) },
      dataZoom: chart.kind === "points" ? [] : [{ type: "inside", zoomOnMouseWheel: "ctrl", moveOnMouseWheel: false }],
      xAxis: x, yAxis: y, series: [...chart.series.flatMap((one, number) => seriesOf(chart, one, number)), ...marksOf(chart)],
    };
  };

  const plots = [...document.querySelectorAll("[data-chart]")];
  const drawn = new Map();
  const PAPER = 290;  // width of a chart in print in pixels, as in the style sheet
  const draw = (plot, width = plot.clientWidth) => {
    const instance = drawn.get(plot) || echarts.init(plot, null, { renderer: data.charts[plot.dataset.chart].kind === "points" ? "canvas" : "svg" });
    drawn.set(plot, instance);
    instance.resize({ width });
    instance.setOption(optionOf(data.charts[plot.dataset.chart], width), { notMerge: true });
  };
  const drawAll = (width) => { plots.forEach((plot) => draw(plot, width)); root.dataset.drawn = String(drawn.size); };
  const drawNext = () => {  // one chart at a time, so that the page stays responsive
    const plot = plots.find((one) => !drawn.has(one));
    if (plot) { draw(plot); setTimeout(drawNext, 0); }
    root.dataset.drawn = String(drawn.size);
  };
  setTimeout(drawNext, 0);
  let waiting = 0;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(() => drawAll(), 150); });
  let themeBefore = "";
  addEventListener("beforeprint", () => { themeBefore = root.dataset.theme; setTheme("light"); drawAll(PAPER); });
  addEventListener("afterprint", () => { setTheme(themeBefore); drawAll(); });

  const tableOf = (chart) => {
    const body = element("tbody");
    for (const one of chart.series) {
      for (const [x, value] of one.data) {
        const place = chart.x.categories ? chart.x.categories[x] : shown(x, chart.x.share);
        body.append(element("tr", {}, element("td", { textContent: one.label }), element("td", { textContent: place }), element("td", { textContent: shown(value, chart.y.share) })));
      }
    }
    const head = element("tr", {}, ...["", chart.x.name, chart.y.name || "value"].map((name) => element("th", { textContent: name, scope: "col" })));
    const box = element("div", { tabIndex: 0 }, element("table", {}, element("thead", {}, head), body));
    box.setAttribute("role", "region");
    box.setAttribute("aria-label", `Values of ${chart.title}`);
    return box;
  };
  for (const details of document.querySelectorAll(".values")) {
    details.addEventListener("toggle", () => {
      const plot = details.parentElement.querySelector("[data-chart]");
      if (details.open && details.childElementCount === 1) details.append(tableOf(data.charts[plot.dataset.chart]));
    });
  }

  // ---- Examples.

  const list = document.getElementById("list");
  if (!list) return;
  const PAGE = 10;
  const signed = (value) => (value > 0 ? "+" : "") + value.toFixed(2).replace("-", "\u2212");
  const right = (row, stage) => row.margins && row.margins[stage] > 0;
  const filters = {
    "pairs, largest gain first": [(row) => row.kind === "pair", (a, b) => b.change - a.change],
    "pairs, largest loss first": [(row) => row.kind === "pair", (a, b) => a.change - b.change],
    "pairs that became correct": [(row) => right(row, "after") && !right(row, "before"), (a, b) => b.change - a.change],
    "pairs that became incorrect": [(row) => row.kind === "pair" && "after" in row.margins && !right(row, "after") && right(row, "before"), (a, b) => a.change - b.change],
    "pairs that are incorrect after training": [(row) => row.kind === "pair" && "after" in row.margins && !right(row, "after"), (a, b) => a.margins.after - b.margins.after],
    "answers": [(row) => row.kind === "answers", () => 0],
  };
  const verdictsOf = (row) => Object.entries(row.verdicts || {}).map(([judge, value]) => `${judge}: ${value}`);
  for (const verdict of [...new Set(data.examples.flatMap(verdictsOf))].sort()) {
    filters[`answers, ${verdict}`] = [(row) => verdictsOf(row).includes(verdict), () => 0];
  }
  const controls = { search: document.getElementById("search"), filter: document.getElementById("filter"),
    run: document.getElementById("run"), shade: document.getElementById("shade") };
  for (const [name, [accepts]] of Object.entries(filters)) {
    const count = data.examples.filter(accepts).length;
    if (count) controls.filter.append(element("option", { value: name, textContent: `${name} (${count})` }));
  }
  const searchable = data.examples.map((row) => [row.prompt, ...row.sides].map((side) => side.texts.join("")).join("\n").toLowerCase());

  const shadeOf = (side, k, by) => {
    const before = side.before && side.before[k], after = side.after && side.after[k];
    const numeric = (value) => typeof value === "number";
    if (by === "change" && numeric(before) && numeric(after)) {
      const change = after - before;
      return [change > 0 ? css("--shade-up") : css("--shade-down"), Math.min(0.5, Math.abs(change) / 4)];
    }
    const value = by === "before" ? before : by === "after" ? after : undefined;
    return numeric(value) ? [css("--shade-down"), Math.min(0.5, -value / 12)] : null;
  };
  const sideOf = (side) => {
    const text = element("div", { className: "text", tabIndex: 0, dir: "auto" });
    text.setAttribute("role", "group");
    text.setAttribute("aria-label", side.name);
    const by = controls.shade && controls.shade.value;
    side.texts.forEach((token, k) => {
      const shade = by ? shadeOf(side, k, by) : null;
      if (!shade || shade[1] < 0.02) { text.append(token); return; }
      const values = ["before", "after"].filter((stage) => side[stage]).map((stage) => `${stage} ${side[stage][k]}`);
      const span = element("span", { textContent: token, title: `log-probability ${values.join(", ")}` });
      span.style.backgroundColor = `rgba(${shade[0]}, ${shade[1].toFixed(2)})`;
      text.append(span);
    });
    const box = element("div", { className: "side" }, element("h4", { textContent: side.name }), text);
    if (side.cut) box.append(element("p", { className: "cut", textContent: `${side.cut.toLocaleString("en")} more characters are not shown.` }));
    return box;
  };
  const exampleOf = (row) => {
    const facts = [];
    if (row.kind === "pair") {
      const margins = Object.entries(row.margins).map(([stage, value]) => `${stage} ${signed(value)}`).join(", ");
      facts.push(`margin ${margins || "unknown"}`);
    }
    facts.push(...verdictsOf(row));
    const where = controls.run ? `${row.run}, ${row.place}` : row.place;
    const head = element("header", {}, element("b", { textContent: facts.join("; ") }), element("span", { textContent: where, dir: "auto" }));
    return element("article", { className: "example" }, head, sideOf(row.prompt), element("div", { className: "sides" }, ...row.sides.map(sideOf)));
  };

  let visible = PAGE;
  const show = () => {
    const [accepts, order] = filters[controls.filter.value] || [() => true, () => 0];
    const wanted = controls.search.value.toLowerCase();
    const run = controls.run ? controls.run.value : "";
    const rows = data.examples.filter((row, k) => accepts(row) && (!run || row.run === run) && (!wanted || searchable[k].includes(wanted))).sort(order);
    list.replaceChildren(...rows.slice(0, visible).map(exampleOf));
    document.getElementById("found").textContent = `${rows.length.toLocaleString("en")} examples${rows.length > visible ? `, ${visible} shown` : ""}.`;
    document.getElementById("more").hidden = rows.length <= visible;
  };
  for (const control of Object.values(controls)) {
    if (control) control.addEventListener("input", () => { visible = PAGE; show(); });
  }
  document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("more").addEventListener("click", () => { visible += PAGE; show(); });
  show();
})();

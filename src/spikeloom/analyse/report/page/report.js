"use strict";
(() => {
  const root = document.documentElement;
  // Colours of lines that are too dark for a dark page.
  const BRIGHT = { "#0072b2": "#56b4e9", "#d55e00": "#f28e2b", "#009e73": "#2fc69b", "#cc79a7": "#e3a3c4" };
  const plots = [...document.querySelectorAll(".plot")].map((box) => {
    const figure = JSON.parse(box.firstElementChild.textContent);
    box.replaceChildren();
    return { box, figure };
  });

  function look() {
    const css = getComputedStyle(root);
    const color = (name) => css.getPropertyValue(name).trim();
    const axis = { gridcolor: color("--line"), zerolinecolor: color("--line"), linecolor: color("--line"), automargin: true };
    const dark = css.colorScheme === "dark";
    return {
      dark,
      scale: [[0, color("--soft")], [1, dark ? "#3f9be8" : "#0b62a8"]],
      template: { layout: {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { color: color("--text"), family: "system-ui, sans-serif", size: 13 },
        xaxis: axis, yaxis: axis, margin: { t: 12, r: 16, b: 48, l: 56 },
        colorway: dark ? ["#6cb6f5", "#ffa05c"] : ["#0b62a8", "#c4520a"],
        legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      } },
    };
  }

  function draw() {
    const { dark, scale, template } = look();
    for (const { box, figure } of plots) {
      const data = figure.data.map((trace) => {
        if (trace.type === "heatmap") return { ...trace, colorscale: scale, showscale: false };
        const color = dark && BRIGHT[trace.line?.color?.toLowerCase()];
        return color ? { ...trace, line: { ...trace.line, color } } : trace;
      });
      const layout = { ...figure.layout, template, autosize: true };
      Plotly.react(box, data, layout, { responsive: true, displaylogo: false, displayModeBar: false });
    }
  }

  // --- light and dark: as the system says, until the reader chooses
  const system = matchMedia("(prefers-color-scheme: dark)");
  const toggle = document.getElementById("theme");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => {
    toggle.textContent = isDark() ? "Use light colours" : "Use dark colours";
    draw();
  };
  toggle.hidden = false;
  toggle.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    show();
  });
  system.addEventListener("change", show);
  show();

  // --- tables that sort by any column: numbers from the largest on, words from A to Z
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
      const body = table.tBodies[0];
      const value = (row) => row.cells[column].dataset.value;
      const numeric = [...body.rows].some((row) => value(row) !== undefined);
      const first = numeric ? "descending" : "ascending";
      const order = head.ariaSort === "none" ? first : head.ariaSort === "ascending" ? "descending" : "ascending";
      const sign = order === "ascending" ? 1 : -1;
      const number = (row) => (value(row) === undefined ? -Infinity : Number(value(row)));
      const text = (row) => row.cells[column].textContent;
      const compare = numeric
        ? (a, b) => number(a) - number(b) || 0
        : (a, b) => text(a).localeCompare(text(b), "en", { numeric: true });
      body.append(...[...body.rows].sort((a, b) => sign * compare(a, b)));
      heads.forEach((other) => { other.ariaSort = other === head ? order : "none"; });
    }));
  }
})();

"use strict";
(() => {
  const get = (id) => document.getElementById(id);
  const data = JSON.parse(get("data").textContent);
  const T = data.steps;
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  const count = (number) => number.toLocaleString("en");
  const state = { step: 0, layer: 0, neuron: 0, timer: null };

  // --- what `activity.py` packs
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

  /** The values [steps, kept] of a layer: 0 and 1, or up to several levels. */
  function unpack(layer) {
    const packed = bytes(layer.bits), size = layer.steps * layer.kept, plane = Math.ceil(size / 8);
    const values = new Uint8Array(size);
    for (let p = 0; p < layer.planes; p++) {
      for (let i = 0; i < size; i++) values[i] |= ((packed[p * plane + (i >> 3)] >> (i & 7)) & 1) << p;
    }
    return values;
  }

  /** The potential of a neuron at a step and level. */
  function potential(layer, step, level, neuron) {
    layer.numbers ??= bytes(layer.values);
    const i = (step * layer.levels + level) * layer.potentials + neuron, at = 3 * (i >> 1);
    const [a, b, c] = layer.numbers.subarray(at, at + 3);
    return layer.low + (i & 1 ? (b >> 4) | (c << 4) : a | ((b & 15) << 8)) / 4095 * (layer.high - layer.low);
  }

  window.spikeloom = { data, unpack, potential };

  // --- where a neuron is in the picture of its layer
  function place(layer) {
    layer.spiked = unpack(layer);
    if (!layer.picture) {
      Object.assign(layer, { width: layer.steps, height: layer.kept });
      layer.x = () => 0;
      layer.y = (n) => layer.kept - 1 - n;
      layer.at = (x, y) => layer.kept - 1 - y;
      return;
    }
    const [rows, columns] = layer.picture, size = rows * columns, maps = Math.ceil(layer.kept / size);
    const across = Math.min(maps, Math.max(1, Math.round(Math.sqrt(maps * (rows + 1) / (columns + 1)))));
    const gap = maps > 1 ? 1 : 0;
    layer.width = across * (columns + gap) - gap;
    layer.height = Math.ceil(maps / across) * (rows + gap) - gap;
    layer.x = (n) => Math.floor(n / size) % across * (columns + gap) + n % columns;
    layer.y = (n) => Math.floor(Math.floor(n / size) / across) * (rows + gap) + Math.floor(n % size / columns);
    layer.at = (x, y) => {
      const column = x % (columns + gap), row = y % (rows + gap);
      if (column >= columns || row >= rows) return -1;
      const map = Math.floor(y / (rows + gap)) * across + Math.floor(x / (columns + gap));
      const n = map * size + row * columns + column;
      return n < layer.kept ? n : -1;
    };
    layer.places = Int32Array.from({ length: layer.kept }, (_, n) => layer.y(n) * layer.width + layer.x(n));
  }

  const stepOf = (layer) => Math.min(state.step, layer.steps - 1);

  // --- pictures of layers: a pixel a neuron
  let colors;
  function readColors() {
    const css = getComputedStyle(document.documentElement);
    const rgb = (name) => [1, 3, 5].map((i) => parseInt(css.getPropertyValue(name).trim().slice(i, i + 2), 16));
    const pixel = ([r, g, b]) => (0xff000000 | (b << 16) | (g << 8) | r) >>> 0;
    const off = rgb("--off"), on = rgb("--on");
    const between = (share) => pixel(off.map((value, i) => Math.round(value + share * (on[i] - value))));
    colors = { between, off: pixel(off), late: pixel(rgb("--late")), now: pixel(rgb("--now")) };
  }

  function draw(layer, canvas) {
    const { width, height, kept } = layer, step = stepOf(layer);
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, height), pixels = new Uint32Array(image.data.buffer);
    const most = 2 ** layer.planes - 1, shades = [...Array(most + 1).keys()].map((v) => colors.between(v / most));
    if (layer.picture) {
      const first = step * kept;
      for (let n = 0; n < kept; n++) pixels[layer.places[n]] = shades[layer.spiked[first + n]];
    } else {
      for (let t = 0; t < layer.steps; t++) {
        for (let n = 0; n < kept; n++) {
          const value = layer.spiked[t * kept + n], silent = t === step ? colors.now : colors.off;
          pixels[(kept - 1 - n) * width + t] = !value ? silent : t > step ? colors.late : shades[value];
        }
      }
    }
    context.putImageData(image, 0, 0);
    canvas.ariaLabel = `${layer.name} at step ${step + 1}: ${percent(layer.rates[step])} spikes per neuron`;
  }

  // --- charts
  function add(parent, name, attributes, text) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  }

  function ticks(low, high) {
    const rough = (high - low) / 4 || 1, power = 10 ** Math.floor(Math.log10(rough));
    const size = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
    const found = [];
    for (let k = Math.ceil(low / size - 1e-9); k * size <= high + 1e-9 * size; k++) found.push(Number((k * size).toPrecision(6)));
    return found;
  }

  /** Lines over the steps: each {values, name}, with thresholds, and dots that are {step, value, spike}. */
  function chart(svg, lines, { low, high, unit = "", thresholds = [], dots = [] }) {
    const width = svg.clientWidth || 320, height = svg.clientHeight || 240;
    const left = 48, right = 12, top = 14, bottom = 36;
    const x = (t) => T > 1 ? left + t / (T - 1) * (width - left - right) : (left + width - right) / 2;
    const y = (v) => height - bottom - (v - low) / ((high - low) || 1) * (height - top - bottom);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren();
    for (const v of ticks(low, high)) {
      add(svg, "line", { class: "grid", x1: left, x2: width - right, y1: y(v), y2: y(v) });
      add(svg, "text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, `${v}${unit}`);
    }
    const apart = Math.max(1, Math.ceil(T / Math.max(2, Math.floor((width - left) / 44))));
    for (let t = 0; t < T; t += apart) add(svg, "text", { x: x(t), y: height - bottom + 16, "text-anchor": "middle" }, t + 1);
    add(svg, "text", { x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle" }, "step");
    add(svg, "line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom });
    svg.now = add(svg, "line", { class: "nowline", y1: top, y2: height - bottom });
    svg.place = () => ["x1", "x2"].forEach((key) => svg.now.setAttribute(key, x(state.step)));
    svg.place();
    for (const value of thresholds) {
      add(svg, "line", { class: "threshold", x1: left, x2: width - right, y1: y(value), y2: y(value) });
      add(svg, "text", { class: "label", x: width - right, y: y(value) - 4, "text-anchor": "end" }, "threshold");
    }
    lines.forEach((values, index) => {
      const points = values.map((value, t) => `${x(t).toFixed(1)},${y(value).toFixed(1)}`);
      add(svg, "polyline", { class: `line c${index % 8}`, points: points.join(" ") });
      if (T === 1) add(svg, "circle", { class: "dot", cx: x(0), cy: y(values[0]), r: 4 });
    });
    for (const dot of dots) {
      add(svg, "circle", { class: dot.spike ? "dot spike" : "dot", cx: x(dot.step), cy: y(dot.value), r: dot.spike ? 4.5 : 3 });
    }
  }

  const column = (index) => data.probabilities.map((row) => 100 * row[index]);
  const drawDecision = () => chart(get("decided"), data.classes.map((_, index) => column(index)), { low: 0, high: 100, unit: " %" });

  // --- the layer and the neuron that were chosen
  function where(layer, n) {
    if (!layer.picture || layer.shape.length < 2) return "";
    const [rows, columns] = layer.picture, row = Math.floor(n / columns) % rows;
    const channel = layer.shape.length > 2 ? `channel ${Math.floor(n / rows / columns)}, ` : "";
    return ` (${channel}row ${row}, column ${n % columns})`;
  }

  function drawNeuron() {
    const layer = data.layers[state.layer], n = state.neuron, steps = [...Array(layer.steps).keys()];
    const spikes = steps.map((t) => layer.spiked[t * layer.kept + n]);
    const fired = steps.filter((t) => spikes[t]).map((t) => t + 1);
    const known = n < layer.potentials;
    get("which").textContent = `Membrane potential of neuron ${n} of ${layer.name}${where(layer, n)}`;
    const listed = fired.length > 12 ? `${fired.slice(0, 12).join(", ")}, ...` : fired.join(", ");
    const fires = fired.length ? `It fires at ${fired.length} of ${layer.steps} steps: ${listed}.` : "It does not fire.";
    const lines = known ? [...Array(layer.levels).keys()].map((k) => steps.map((t) => potential(layer, t, k, n))) : [];
    let says = `Its potential is not in this page: ${layer.why || `only those of neurons 0 to ${layer.potentials - 1} are`}.`;
    if (known) {
      const all = [...lines.flat(), ...layer.thresholds], low = Math.min(...all), high = Math.max(...all);
      const margin = 0.08 * (high - low) || 0.5;
      const dots = steps.flatMap((step) => layer.steps <= 40 || spikes[step] ? [{ step, value: lines[0][step], spike: spikes[step] > 0 }] : []);
      chart(get("membrane"), lines, { low: low - margin, high: high + margin, thresholds: layer.thresholds, dots });
      const limit = layer.thresholds.length ? "Its threshold is dashed" : "It has no threshold that is fixed";
      says = `Filled dots are spikes. ${limit}. A point is the potential before the decision to fire.`;
    }
    get("membrane").style.display = get("values").style.display = known ? "" : "none";
    get("membrane").ariaLabel = `${get("which").textContent}. ${fires}`;
    get("fires").textContent = `${fires} ${says}`;
    get("values").querySelector("tbody").replaceChildren(...(known ? steps : []).map((t) => {
      const row = document.createElement("tr");
      const head = document.createElement("th");
      head.scope = "row";
      head.textContent = t + 1;
      row.append(head);
      for (const text of [lines.map((line) => line[t].toPrecision(4)).join(", "), spikes[t]]) row.insertCell().textContent = text;
      return row;
    }));
    mark();
  }

  function mark() {
    const layer = data.layers[state.layer], marker = get("marker").style;
    const cell = layer.picture ? 100 / layer.width : 100;
    marker.left = `${(layer.x(state.neuron) + 0.5) * cell}%`;
    marker.top = `${(layer.y(state.neuron) + 0.5) * 100 / layer.height}%`;
    marker.width = `${cell}%`;
    marker.height = `${100 / layer.height}%`;
  }

  function choose(index, neuron) {
    const layer = data.layers[index];
    Object.assign(state, { layer: index, neuron: Math.min(Math.max(0, neuron), layer.kept - 1) });
    get("layer").value = index;
    Object.assign(get("neuron"), { value: state.neuron, max: layer.kept - 1 });
    get("range").textContent = `0 to ${count(layer.kept - 1)}${layer.kept < layer.neurons ? ` of ${count(layer.neurons)}` : ""}; or click one in the picture`;
    const canvas = get("canvas"), large = get("large").style;
    large.width = layer.picture ? `${Math.round(Math.min(640, 30 * 16 * layer.width / layer.height))}px` : "100%";
    canvas.style.height = layer.picture ? "auto" : `${Math.min(480, Math.max(120, 4 * layer.kept))}px`;
    document.querySelectorAll("[data-layer]").forEach((button) => { button.ariaPressed = String(Number(button.dataset.layer) === index); });
    draw(layer, canvas);
    caption();
    drawNeuron();
  }

  function caption() {
    const layer = data.layers[state.layer], step = stepOf(layer);
    const shape = `${layer.shape.join(" x ")} neurons (${layer.kind})`;
    get("about").textContent = `${layer.name}: ${shape}, ${percent(layer.rates[step])} at step ${step + 1}, ${count(layer.spikes)} spikes in all steps.`;
  }

  // --- the steps
  const thumbs = [...document.querySelectorAll("[data-layer]")].map((button) => ({
    layer: data.layers[button.dataset.layer], canvas: button.querySelector("canvas"), now: button.querySelector("[data-now]"),
  }));

  function show() {
    const step = state.step;
    get("step").value = step + 1;
    get("at").textContent = `Step ${step + 1} of ${T}`;
    if (data.frames.length) {
      get("seen").src = `data:image/png;base64,${data.frames[Math.min(step, data.frames.length - 1)]}`;
      get("seen").alt = `${data.words}; step ${step + 1}`;
    }
    if (data.moving) Object.assign(get("cursor").style, { left: `${100 * step / T}%`, width: `${100 / T}%` });
    data.classes.forEach((_, index) => {
      document.querySelector(`[data-class="${index}"]`).textContent = percent(data.probabilities[step][index]);
    });
    get("leader").textContent = `After step ${step + 1}: ${data.leaders[step]}.`;
    for (const { layer, canvas, now } of thumbs) {
      draw(layer, canvas);
      now.textContent = `${percent(layer.rates[stepOf(layer)])} now`;
    }
    draw(data.layers[state.layer], get("canvas"));
    caption();
    get("decided").place?.();
    get("membrane").place?.();
  }

  function go(step) {
    state.step = (step + T) % T;
    show();
  }

  function stop() {
    clearTimeout(state.timer);
    state.timer = null;
    get("play").textContent = "Play";
    get("at").ariaLive = "polite";
  }

  function play() {
    get("play").textContent = "Stop";
    get("at").ariaLive = "off";
    const next = () => { state.timer = setTimeout(() => { go(state.step + 1); next(); }, 1000 / get("speed").value); };
    next();
  }

  const toggle = () => (state.timer === null ? play() : stop());
  const to = (step) => { stop(); go(step); };
  const moves = {
    ArrowLeft: () => to(Math.max(0, state.step - 1)), ArrowRight: () => to(Math.min(T - 1, state.step + 1)),
    Home: () => to(0), End: () => to(T - 1), " ": toggle,
  };
  const buttons = { first: "Home", back: "ArrowLeft", play: " ", next: "ArrowRight", last: "End" };
  for (const [id, key] of Object.entries(buttons)) get(id).addEventListener("click", moves[key]);
  get("step").addEventListener("input", () => to(get("step").value - 1));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.shiftKey || !(event.key in moves)) return;
    // Fields and tables that scroll have these keys for themselves; the space bar presses the button that has the focus.
    if (event.target.closest("input, select, .scroll") || (event.key === " " && event.target.closest("button, summary, a"))) return;
    event.preventDefault();
    moves[event.key]();
  });

  get("layer").addEventListener("change", () => choose(Number(get("layer").value), 0));
  get("neuron").addEventListener("change", () => choose(state.layer, Math.round(Number(get("neuron").value)) || 0));
  get("canvas").addEventListener("click", (event) => {
    const layer = data.layers[state.layer], box = get("canvas").getBoundingClientRect();
    const pixel = (at, size, pixels) => Math.min(pixels - 1, Math.max(0, Math.floor(at / size * pixels)));
    const neuron = layer.at(pixel(event.clientX - box.left, box.width, layer.width), pixel(event.clientY - box.top, box.height, layer.height));
    if (neuron >= 0) choose(state.layer, neuron);
  });
  for (const button of document.querySelectorAll("[data-layer]")) {
    button.addEventListener("click", () => {
      choose(Number(button.dataset.layer), 0);
      get("one").scrollIntoView();
    });
  }

  // --- colours and sizes that change
  const recolor = () => { readColors(); show(); };
  new MutationObserver(recolor).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolor);
  addEventListener("resize", () => { drawDecision(); drawNeuron(); });

  data.layers.forEach(place);
  for (const { layer, canvas } of thumbs) canvas.style.imageRendering = layer.width > 160 || layer.height > 160 ? "auto" : "pixelated";
  readColors();
  drawDecision();
  // The neuron that changes most in the first layer says more than number 0, which is often silent.
  const first = data.layers[0], changes = new Uint32Array(first.potentials || first.kept);
  for (let i = first.kept; i < first.spiked.length; i++) {
    if (first.spiked[i] !== first.spiked[i - first.kept]) changes[i % first.kept] += 1;
  }
  choose(0, changes.reduce((best, value, n) => (value > changes[best] ? n : best), 0));
  show();
  if (T > 1 && !matchMedia("(prefers-reduced-motion: reduce)").matches) play();
})();

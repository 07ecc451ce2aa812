// The map of experts: rows are layers, columns experts. Drawn on a canvas, since a large model has fifteen thousand of them.

import { colour, count, element, hosts, milliseconds, plural, prepare, short, swatch } from "./format.js";

const LABEL = 34;
const HEAD = 18;
const [NARROWEST, WIDEST] = [4, 46];
const [LOWEST, HIGHEST] = [5, 30];
/** The map is about so high if the number of layers allows. */
const HEIGHT = 300;
/** Cells of this size have room for a number. */
const ROOM = 18;
const STEPS = 4;

export class ExpertMap {
  #view = null;
  #mode = "replicas";
  #before = new Map();
  #lit = new Map();
  #chosen = null;
  #pinned = false;
  #peer = null;
  #cell = { width: 0, height: 0 };

  constructor(canvas, legend, details, note) {
    Object.assign(this, { canvas, legend, details, note });
    canvas.addEventListener("pointermove", (event) => event.pointerType === "mouse" && !this.#pinned && this.#choose(this.#at(event)));
    canvas.addEventListener("pointerleave", () => !this.#pinned && this.#choose(null));
    canvas.addEventListener("click", (event) => {
      const at = this.#at(event);
      this.#pinned = at !== null && !(this.#pinned && this.#chosen?.row === at.row && this.#chosen?.expert === at.expert);
      this.#choose(at);
    });
    canvas.addEventListener("keydown", (event) => this.#onKey(event));
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
  }

  /** Colours by `replicas`, `calls` or `demand`. */
  set mode(mode) {
    this.#mode = mode;
    this.draw();
  }

  /** Marks the experts of a peer; of none with `null`. */
  set peer(peer) {
    this.#peer = peer;
    this.draw();
  }

  show(view) {
    for (const layer of view.layers) {
      const before = this.#before.get(layer.layer);
      const risen = (calls, expert) => (before !== undefined && calls > before[expert] ? 1 : 0);
      const faded = this.#lit.get(layer.layer) ?? [];
      this.#lit.set(layer.layer, layer.calls.map((calls, expert) => risen(calls, expert) || (faded[expert] ?? 0) * 0.45));
      this.#before.set(layer.layer, layer.calls);
    }
    this.#view = view;
    this.draw();
    if (this.#chosen) this.#describe();
  }

  draw() {
    const layers = this.#view?.layers ?? [];
    if (layers.length === 0) return;
    const columns = Math.max(...layers.map((layer) => layer.experts));
    const room = this.canvas.parentElement.clientWidth - LABEL - 1;
    const width = Math.min(WIDEST, Math.max(NARROWEST, room / columns));
    const height = Math.min(HIGHEST, Math.max(LOWEST, HEIGHT / layers.length), Math.max(LOWEST, width * 1.2));
    this.#cell = { width, height };
    const context = prepare(this.canvas, Math.ceil(LABEL + columns * width + 1), Math.ceil(HEAD + layers.length * height + 1));
    this.#palette = this.#readPalette();
    this.#most = Math.max(1, ...layers.map((layer) => Math.max(...layer[this.#mode])));
    this.#drawLabels(context, layers, columns);
    layers.forEach((layer, row) => this.#drawRow(context, layer, row));
    this.#drawChoice(context);
    this.#drawLegend(layers);
  }

  #palette = null;
  #most = 1;

  #readPalette() {
    const scale = Array.from({ length: STEPS }, (_, step) => colour(`scale-${step}`));
    const names = ["hole", "on-hole", "soft", "text", "pick", "card", "scale-on-0", "scale-on-3"];
    return { scale, ...Object.fromEntries(names.map((name) => [name, colour(name)])) };
  }

  /** The step of the scale, 0 to 3, of a cell that is no hole. */
  #step(value) {
    if (this.#mode === "replicas") return Math.min(STEPS, value) - 1;
    // By factors: a few experts are called far more often than most.
    return value === 0 ? 0 : Math.min(STEPS - 1, Math.floor((Math.log(value + 1) / Math.log(this.#most + 1)) * STEPS * 0.999));
  }

  #drawLabels(context, layers, columns) {
    const { width, height } = this.#cell;
    context.fillStyle = this.#palette.soft;
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    context.textAlign = "right";
    // Layers with holes are always named; of the others as many as there is room for.
    const middle = (row) => HEAD + (row + 0.5) * height;
    const broken = layers.flatMap((layer, row) => (layer.replicas.includes(0) ? [row] : []));
    const rows = [1, 2, 4, 8, 16].find((every) => every * height >= 13) ?? 32;
    const isFree = (row) => broken.every((other) => Math.abs(other - row) * height >= 12);
    layers.forEach((layer, row) => row % rows === 0 && isFree(row) && context.fillText(layer.layer, LABEL - 7, middle(row)));
    context.fillStyle = this.#palette.hole;
    context.font = "bold 11px system-ui, sans-serif";
    let named = -100;
    for (const row of broken) {
      if (middle(row) - named < 12) continue;
      named = middle(row);
      context.fillText(`✕ ${layers[row].layer}`, LABEL - 7, named);
    }
    context.fillStyle = this.#palette.soft;
    context.font = "11px system-ui, sans-serif";
    context.textAlign = "center";
    const every = [1, 2, 4, 8, 16, 32].find((every) => every * width >= 22) ?? 64;
    for (let expert = 0; expert < columns; expert += every) context.fillText(expert, LABEL + (expert + 0.5) * width, HEAD / 2);
  }

  #drawRow(context, layer, row) {
    const { width, height } = this.#cell;
    const gap = Math.min(width, height) > 9 ? 2 : Math.min(width, height) > 5 ? 1 : 0.5;
    const lit = this.#lit.get(layer.layer) ?? [];
    const radius = Math.min(4, width / 6, height / 6);
    for (let expert = 0; expert < layer.experts; expert++) {
      const [x, y] = [LABEL + expert * width, HEAD + row * height];
      const box = [x, y, width - gap, height - gap];
      const isHole = layer.replicas[expert] === 0;
      const isOther = this.#peer !== null && !hosts(this.#peer, layer.layer, expert);
      context.globalAlpha = isOther && !isHole ? 0.25 : 1;
      const step = this.#step(layer[this.#mode][expert]);
      context.fillStyle = isHole ? this.#palette.hole : this.#palette.scale[step];
      context.beginPath();
      context.roundRect(...box, radius);
      context.fill();
      if (isHole) this.#drawCross(context, box);
      else this.#drawInside(context, box, step, layer[this.#mode][expert], lit[expert] ?? 0);
      context.globalAlpha = 1;
    }
  }

  /** Holes are told by their shape too. */
  #drawCross(context, [x, y, width, height]) {
    const size = Math.min(width, height) * 0.26;
    const [cx, cy] = [x + width / 2, y + height / 2];
    context.strokeStyle = this.#palette["on-hole"];
    context.lineWidth = Math.max(1, size / 2.6);
    context.beginPath();
    context.moveTo(cx - size, cy - size);
    context.lineTo(cx + size, cy + size);
    context.moveTo(cx + size, cy - size);
    context.lineTo(cx - size, cy + size);
    context.stroke();
  }

  #drawInside(context, [x, y, width, height], step, value, lit) {
    const ink = this.#palette[step >= STEPS / 2 ? "scale-on-3" : "scale-on-0"];
    const text = count(value);
    if (height >= ROOM && width >= Math.max(ROOM, text.length * 6 + 6)) {
      context.fillStyle = ink;
      context.font = "11px system-ui, sans-serif";
      context.textAlign = "center";
      context.textBaseline = "middle";
      context.fillText(text, x + width / 2, y + height / 2 + 0.5);
    }
    if (lit > 0.1) {
      // It has just been called.
      context.globalAlpha *= lit;
      context.fillStyle = ink;
      if (height >= ROOM) context.fillRect(x + width * 0.2, y + height - 4, width * 0.6, 2);
      else context.fillRect(x + width * 0.3, y + height * 0.3, width * 0.4, height * 0.4);
      context.globalAlpha = 1;
    }
  }

  #drawChoice(context) {
    if (!this.#chosen) return;
    const { width, height } = this.#cell;
    context.strokeStyle = this.#palette.pick;
    context.lineWidth = 2;
    context.strokeRect(LABEL + this.#chosen.expert * width - 0.5, HEAD + this.#chosen.row * height - 0.5, width - 0.5, height - 0.5);
  }

  #drawLegend(layers) {
    const key = `${this.#mode} ${this.#most} ${this.#palette.scale} ${layers.length}`;
    if (this.legend.dataset.key === key) return;
    this.legend.dataset.key = key;
    const item = (text, draw) => {
      const sample = document.createElement("canvas");
      draw(prepare(sample, 16, 16));
      return element("span", "", sample, text);
    };
    const filled = (fill) => (context) => {
      context.fillStyle = fill;
      context.fillRect(0, 0, 16, 16);
    };
    const hole = (context) => {
      filled(this.#palette.hole)(context);
      this.#drawCross(context, [0, 0, 16, 16]);
    };
    const bound = (step) => Math.max(step, Math.ceil((this.#most + 1) ** (step / STEPS)) - 1);
    const texts = {
      replicas: ["1 replica", "2", "3", "4 or more"],
      calls: [0, 1, 2, 3].map((step) => `from ${count(bound(step))}${step === 0 ? " rows" : ""}`),
      demand: [0, 1, 2, 3].map((step) => `from ${count(bound(step))}${step === 0 ? " rows a minute" : ""}`),
    }[this.#mode];
    this.legend.replaceChildren(item("no peer: a hole", hole), ...texts.map((text, step) => item(text, filled(this.#palette.scale[step]))));
    this.note.textContent = {
      replicas: "Rows are layers, cells experts: by how many peers can be called for each. Marked: just called.",
      calls: "Rows are layers, cells experts: by how many rows were sent to each from here.",
      demand: "Rows are layers, cells experts: by how many rows a minute its peers compute for everybody.",
    }[this.#mode];
  }

  #at(event) {
    const box = this.canvas.getBoundingClientRect();
    const expert = Math.floor((event.clientX - box.left - LABEL) / this.#cell.width);
    const row = Math.floor((event.clientY - box.top - HEAD) / this.#cell.height);
    const layer = this.#view?.layers[row];
    return layer && expert >= 0 && expert < layer.experts ? { row, expert } : null;
  }

  #onKey(event) {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.key === "Escape") {
      this.#pinned = false;
      return this.#choose(null);
    }
    const layers = this.#view?.layers ?? [];
    if (!steps[event.key] || layers.length === 0) return undefined;
    event.preventDefault();
    const [down, right] = this.#chosen ? steps[event.key] : [0, 0];
    const { row, expert } = this.#chosen ?? { row: 0, expert: 0 };
    const clamp = (value, count) => Math.min(count - 1, Math.max(0, value));
    const to = clamp(row + down, layers.length);
    this.#pinned = true;
    return this.#choose({ row: to, expert: clamp(expert + right, layers[to].experts) });
  }

  #choose(cell) {
    if (cell?.row === this.#chosen?.row && cell?.expert === this.#chosen?.expert && cell !== null) return;
    this.#chosen = cell;
    this.#described = "";
    this.draw();
    this.#describe();
  }

  #described = "";

  #describe() {
    if (!this.#chosen) {
      this.details.replaceChildren("Point at a cell, or tap it, to see who hosts the expert.");
      return;
    }
    const layer = this.#view.layers[this.#chosen.row];
    const { expert } = this.#chosen;
    if (!layer || expert >= layer.experts) return;
    const peers = this.#view.peers.filter((peer) => peer.state !== "lost" && hosts(peer, layer.layer, expert));
    const lost = this.#view.peers.filter((peer) => peer.state === "lost" && hosts(peer, layer.layer, expert));
    const facts = [plural(layer.replicas[expert], "replica")];
    if (this.#view.engine) facts.push(`${plural(layer.calls[expert], "row")} sent from here`);
    if (layer.demand[expert] > 0) facts.push(`${count(layer.demand[expert])} rows a minute for everybody`);
    const who = (peer) => {
      const how = peer.state === "connected" ? `${peer.path}, ${milliseconds(peer.round_trip_ms)}` : peer.state;
      return element("span", "who", swatch(peer.peer_id), ` ${short(peer.peer_id)} (${how})`);
    };
    const named = [...peers, ...lost];
    const text = `${layer.layer} ${expert} ${facts} ${named.map((peer) => peer.peer_id + peer.state)}`;
    if (text === this.#described) return;
    this.#described = text;
    const title = element("strong", "", `Layer ${layer.layer}, expert ${expert}`);
    const list = named.flatMap((peer, i) => [i === 0 ? " · " : ", ", who(peer)]);
    const hole = layer.replicas[expert] === 0 ? " · a hole: answers that need it wait for a peer" : "";
    this.details.replaceChildren(title, ` · ${facts.join(" · ")}${hole}`, ...list);
  }
}

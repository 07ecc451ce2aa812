// One forward pass through the layers: who was called, how long it took, and where the time went.

import { colour, element, milliseconds, peerColour, plural, prepare, short, swatch } from "./format.js";

const LABEL = 34;
const AXIS = 18;
const HEIGHT = 220;
const [THINNEST, THICKEST] = [3, 12];
const OLD_MS = 4000;

export class Trace {
  #shown = null;
  #held = false;

  constructor({ canvas, scroll, share, legend, note, hold }) {
    Object.assign(this, { canvas, scroll, share, legend, note });
    hold.addEventListener("click", () => {
      this.#held = !this.#held;
      hold.setAttribute("aria-pressed", String(this.#held));
    });
    new ResizeObserver(() => this.draw()).observe(scroll);
  }

  show(trace) {
    if (!trace || this.#held) return;
    this.#shown = trace;
    const age = trace.age_ms > OLD_MS ? ` · ${milliseconds(trace.age_ms)} ago` : "";
    const rows = trace.rows === 1 ? "one token" : `${trace.rows} rows together`;
    const calls = trace.layers.reduce((sum, layer) => sum + layer.calls.length, 0);
    this.note.textContent = `${milliseconds(trace.total_ms)} for ${rows} through ${plural(trace.layers.length, "layer")}, ${plural(calls, "call")}${age}`;
    this.#showShare(trace);
    this.draw();
  }

  /** Trunk, way and queues, computing: of each layer the call that ended last counts. */
  #showShare(trace) {
    const last = (layer) => layer.calls.reduce((a, b) => (b.compute_ms !== null && b.start_ms + b.ms > (a ? a.start_ms + a.ms : 0) ? b : a), null);
    const experts = trace.layers.reduce((sum, layer) => sum + layer.ms, 0);
    const compute = trace.layers.reduce((sum, layer) => sum + Math.min(layer.ms, last(layer)?.compute_ms ?? 0), 0);
    const parts = [
      ["compute", "peers compute", compute],
      ["way", "way and queues", experts - compute],
      ["trunk", "trunk, here", Math.max(0, trace.total_ms - experts)],
    ];
    const percent = (value) => Math.round((100 * value) / Math.max(trace.total_ms, 1e-9));
    this.share.replaceChildren(
      ...parts.map(([kind, , value]) => {
        const part = element("i", kind);
        part.style.flex = `${Math.max(value, 1e-6)} 0 0`;
        return part;
      }),
    );
    const texts = parts.map(([kind, name, value]) => {
      const square = element("span", "swatch");
      square.style.color = `var(--${kind})`;
      return element("span", "", square, `${name} ${percent(value)} %`);
    });
    this.share.setAttribute("aria-label", `Where the time went: ${texts.map((text) => text.textContent).join(", ")}`);
    const peers = [...new Set(trace.layers.flatMap((layer) => layer.calls.map((call) => call.peer_id)))].sort();
    const doubled = trace.layers.some((layer) => layer.calls.some((call) => call.hedged || call.retried));
    this.legend.replaceChildren(
      ...texts,
      ...peers.map((peer) => element("span", "id", swatch(peer), short(peer))),
      ...(doubled ? [element("span", "", "outlined: asked a second time")] : []),
    );
  }

  draw() {
    const trace = this.#shown;
    if (!trace || trace.layers.length === 0) return;
    const lanes = trace.layers.map((layer) => Math.max(1, layer.calls.length));
    const all = lanes.reduce((sum, count) => sum + count, 0);
    const gap = trace.layers.length > 24 ? 1 : 4;
    const lane = Math.min(THICKEST, Math.max(THINNEST, (HEIGHT - gap * trace.layers.length) / all));
    const width = Math.max(200, this.scroll.clientWidth - 2);
    const context = prepare(this.canvas, width, Math.ceil(all * lane + gap * trace.layers.length + AXIS));
    const x = (ms) => LABEL + (ms / Math.max(trace.total_ms, 1e-9)) * (width - LABEL - 4);
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    this.#drawAxis(context, trace.total_ms, x);
    let y = AXIS;
    let labelled = -100;
    trace.layers.forEach((layer, i) => {
      const height = lanes[i] * lane;
      context.fillStyle = colour("field");
      context.fillRect(x(layer.start_ms), y - gap / 2, Math.max(1, x(layer.start_ms + layer.ms) - x(layer.start_ms)), height + gap);
      if (y + height / 2 - labelled >= 13) {
        labelled = y + height / 2;
        context.fillStyle = colour("soft");
        context.textAlign = "right";
        context.fillText(layer.layer, LABEL - 7, labelled);
      }
      layer.calls.forEach((call, at) => this.#drawCall(context, call, x, y + at * lane, lane));
      y += height + gap;
    });
  }

  #drawAxis(context, total, x) {
    context.fillStyle = colour("soft");
    const step = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000].find((step) => total / step <= 6) ?? 10000;
    for (let ms = 0; ms <= total; ms += step) {
      context.textAlign = ms === 0 ? "left" : "center";
      if (x(ms) < x(total) - 18 || ms === 0) context.fillText(`${+ms.toFixed(1)} ms`, x(ms), AXIS / 2 - 1);
    }
  }

  /** The whole call pale, its computing full: in the middle, since its queue and way are on both sides. */
  #drawCall(context, call, x, y, lane) {
    const [from, to] = [x(call.start_ms), x(call.start_ms + call.ms)];
    const height = Math.max(1, lane - (lane > 5 ? 2 : 0.5));
    const width = Math.max(1, to - from);
    context.fillStyle = colour(peerColour(call.peer_id));
    context.globalAlpha = 0.38;
    context.fillRect(from, y, width, height);
    context.globalAlpha = 1;
    if (call.compute_ms !== null) {
      const part = width * Math.min(1, call.compute_ms / Math.max(call.ms, 1e-9));
      context.fillRect(from + (width - part) / 2, y, part, height);
    }
    if (call.hedged || call.retried) {
      context.strokeStyle = colour("text");
      context.lineWidth = 1;
      context.strokeRect(from + 0.5, y + 0.5, width - 1, height - 1);
    }
  }
}

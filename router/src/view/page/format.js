// What all parts of the page say alike: names, numbers, colours.

const PEER_COLOURS = 8;
const colours = new Map();

/** A peer id's end: its beginning is the same for all. */
export const short = (peer) => `…${peer.slice(-6)}`;

/** The value of a colour of the style sheet, light or dark as the reader has it. */
export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** The name of a peer's colour, the same everywhere on the page; those seen first have different ones. */
export function peerColour(peer) {
  if (!colours.has(peer)) colours.set(peer, `peer-${colours.size % PEER_COLOURS}`);
  return colours.get(peer);
}

/** A small square in a peer's colour. */
export function swatch(peer) {
  const square = element("span", "swatch");
  square.style.color = `var(--${peerColour(peer)})`;
  square.setAttribute("aria-hidden", "true");
  return square;
}

/** Milliseconds, with as many digits as are worth reading. */
export function milliseconds(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 1000) return `${(value / 1000).toFixed(1)} s`;
  return `${value.toFixed(value < 10 ? 1 : 0)} ms`;
}

/** A count: 1234 as 1.2 k. */
export function count(value) {
  for (const [unit, name] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (value >= unit * 10) return `${Math.round(value / unit)} ${name}`;
    if (value >= unit) return `${(value / unit).toFixed(1)} ${name}`;
  }
  return String(value);
}

/** One thing or several: `plural(2, "peer")` is "2 peers". */
export const plural = (value, thing) => `${value} ${thing}${value === 1 ? "" : "s"}`;

/** Whether ranges such as "0-3,7" hold a number. */
export const inRanges = (ranges, number) =>
  ranges.split(",").some((range) => {
    const [first, last = first] = range.split("-").map(Number);
    return first <= number && number <= last;
  });

/** Ascending numbers as ranges. */
export function ranges(numbers) {
  const parts = [];
  for (const number of numbers) {
    const last = parts.at(-1);
    if (last && last[1] + 1 === number) last[1] = number;
    else parts.push([number, number]);
  }
  return parts.map(([first, last]) => (first === last ? `${first}` : `${first}–${last}`)).join(", ");
}

/** Whether a peer hosts an expert. */
export const hosts = (peer, layer, expert) =>
  peer.hosted.some(([layers, experts]) => inRanges(layers, layer) && inRanges(experts, expert));

/** A new element with a class and children. */
export function element(tag, kind, ...children) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  made.append(...children);
  return made;
}

/** Gives a canvas so many CSS pixels, sharp on every screen, and returns its cleared context. */
export function prepare(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const [across, down] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== across || canvas.height !== down) {
    [canvas.width, canvas.height] = [across, down];
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

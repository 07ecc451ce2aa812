// The table of peers.

import { count, element, milliseconds, peerColour, short, swatch } from "./format.js";

const STATES = {
  connected: ["●", "connected"],
  "set aside": ["◐", "away"],
  draining: ["◌", "away"],
  connecting: ["○", "away"],
  lost: ["✕", "lost"],
};

export class PeerTable {
  #rows = new Map();
  #chosen = null;

  /** `onChoose` is called with the id of the peer that was chosen, or `null`. */
  constructor(body, onChoose) {
    Object.assign(this, { body, onChoose });
  }

  show(view) {
    const known = new Set(view.peers.map((peer) => peer.peer_id));
    for (const [id, row] of this.#rows) {
      if (known.has(id)) continue;
      row.line.remove();
      this.#rows.delete(id);
      if (this.#chosen === id) this.#choose(id);
    }
    for (const peer of view.peers) {
      if (!this.#rows.has(peer.peer_id)) this.#rows.set(peer.peer_id, this.#make(peer.peer_id));
      this.#fill(this.#rows.get(peer.peer_id), peer);
    }
    // In the order of the document, moving only those that are not in their place.
    view.peers.forEach((peer, i) => {
      const { line } = this.#rows.get(peer.peer_id);
      if (this.body.children[i] !== line) this.body.insertBefore(line, this.body.children[i] ?? null);
    });
  }

  #make(id) {
    peerColour(id);
    const button = element("button", "pick id", swatch(id), short(id));
    button.type = "button";
    button.title = id;
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => this.#choose(id));
    const line = document.createElement("tr");
    line.setAttribute("role", "row");
    const cells = {};
    const columns = [
      ["who", "peer", ""], ["mood", "state", ""], ["trip", "round trip", "number"], ["path", "path", ""], ["load", "load", ""],
      ["experts", "experts", "number"], ["calls", "calls", "number", true], ["mean", "mean", "number", true],
      ["p99", "p99", "number", true], ["failures", "failed", "number", true], ["precision", "precision", ""], ["address", "address", ""],
    ];
    for (const [name, label, kind, needsEngine] of columns) {
      const cell = element("td", `${name} ${kind}`);
      cell.dataset.label = label;
      if (needsEngine) cell.dataset.needs = "engine";
      cell.setAttribute("role", "cell");
      cells[name] = cell;
      line.append(cell);
    }
    cells.who.append(button);
    return { line, cells, button };
  }

  #fill({ line, cells }, peer) {
    const [sign, kind] = STATES[peer.state] ?? ["?", "away"];
    line.classList.toggle("gone", peer.state === "lost");
    const mark = element("b", "", sign);
    mark.setAttribute("aria-hidden", "true");
    set(cells.mood, peer.state, () => element("span", `state ${kind}`, mark, peer.state));
    set(cells.trip, milliseconds(peer.round_trip_ms));
    set(cells.path, peer.path ?? "–");
    set(cells.load, `${Math.round(peer.load * 100)} %`, (text) => {
      const bar = element("i", peer.load > 0.8 ? "high" : "");
      bar.style.width = text.replace(" ", "");
      const whole = element("span", "meter", bar);
      whole.setAttribute("aria-hidden", "true");
      return element("span", "", whole, text);
    });
    set(cells.experts, peer.loading ? `${peer.experts} (+${peer.loading})` : `${peer.experts}`);
    set(cells.calls, count(peer.calls));
    set(cells.mean, milliseconds(peer.mean_ms));
    set(cells.p99, milliseconds(peer.p99_ms));
    set(cells.failures, count(peer.failures));
    set(cells.precision, peer.precision.join(" "));
    set(cells.address, peer.address ?? "–");
    cells.address.title = peer.address ?? "";
  }

  /** Chooses a peer, or no peer if it was chosen. */
  #choose(id) {
    this.#chosen = this.#chosen === id ? null : id;
    for (const [other, row] of this.#rows) row.button.setAttribute("aria-pressed", String(other === this.#chosen));
    this.onChoose(this.#chosen);
  }
}

/** Changes a cell only if its text has changed, so that a reader's selection stays. */
function set(cell, text, make = (text) => text) {
  if (cell.dataset.text === text) return;
  cell.dataset.text = text;
  cell.replaceChildren(make(text));
}

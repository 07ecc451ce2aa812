// Puts the page together: one document of the network after another goes to every part of it.

import { Chat } from "./chat.js";
import { follow } from "./feed.js";
import { element, plural, ranges } from "./format.js";
import { ExpertMap } from "./map.js";
import { PeerTable } from "./peers.js";
import { Sparkline } from "./speed.js";
import { key } from "./stream.js";
import { Trace } from "./trace.js";

const by = (id) => document.getElementById(id);

const map = new ExpertMap(by("map"), by("legend"), by("cell"), by("map-note"));
const sparkline = new Sparkline(by("sparkline"));
const trace = new Trace({
  canvas: by("trace"), scroll: by("trace-scroll"), share: by("share"), legend: by("trace-legend"), note: by("trace-note"), hold: by("hold"),
});
const chat = new Chat({
  talk: by("talk"), form: by("say"), prompt: by("prompt"), send: by("send"), fresh: by("chat-new"),
});
let chosen = null;
let latest = null;
const table = new PeerTable(by("peers"), (id) => {
  chosen = id;
  map.peer = latest?.peers.find((peer) => peer.peer_id === id) ?? null;
});

for (const input of document.querySelectorAll("input[name=colour]")) {
  input.addEventListener("change", () => (map.mode = input.value));
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  map.draw();
  sparkline.draw();
  trace.draw();
});

/** Which experts have no peer, layer by layer, or as much of it as can be read. */
function holes(view) {
  const missing = view.layers
    .map((layer) => [layer.layer, layer.replicas.flatMap((replicas, expert) => (replicas === 0 ? [expert] : []))])
    .filter(([, experts]) => experts.length > 0);
  const shown = missing.slice(0, 3).map(([layer, experts]) => {
    const text = ranges(experts);
    return `layer ${layer}: ${text.length > 40 ? plural(experts.length, "expert") : text}`;
  });
  if (missing.length > shown.length) shown.push(`and ${plural(missing.length - shown.length, "more layer")}`);
  return shown.join("; ");
}

function say(text, isMild) {
  const alarm = by("alarm");
  alarm.hidden = text === "";
  alarm.classList.toggle("mild", isMild);
  if (alarm.textContent !== text) alarm.textContent = text;
}

function figures(view) {
  const all = view.layers.reduce((sum, layer) => sum + layer.experts, 0);
  const connected = view.peers.filter((peer) => peer.state === "connected").length;
  const others = view.peers.length - connected;
  const small = (text) => element("small", "", text);
  by("name").textContent = view.name;
  by("model-id").textContent = view.name === view.model_id ? "" : view.model_id.slice(0, 12);
  by("model-id").title = view.model_id;
  by("covered").replaceChildren(`${all - view.missing}`, small(` of ${all}`));
  by("peer-count").replaceChildren(`${connected}`, small(others > 0 ? `${others} away` : ""));
  if (view.engine) {
    by("running").replaceChildren(`${view.engine.running}`, small(view.engine.waiting > 0 ? `${view.engine.waiting} waiting` : ""));
    const speed = view.tokens_per_second;
    by("speed").textContent = speed === null ? "–" : speed.toFixed(speed < 10 ? 1 : 0);
    sparkline.add(speed);
  }
  document.title = view.missing > 0 ? `✕ ${view.missing} missing · Hanse` : `${view.name} · Hanse`;
  if (view.missing === 0) say("", false);
  else say(`✕ ${plural(view.missing, "expert")} without a peer: ${holes(view)}`, false);
}

function onView(view) {
  latest = view;
  document.body.classList.remove("stale");
  document.body.classList.toggle("watching", view.engine === null);
  document.body.classList.toggle("no-chat", !view.chat);
  by("chat").hidden = !view.chat;
  by("live").classList.add("on");
  by("live-text").textContent = "live";
  by("no-peers").hidden = view.peers.length > 0;
  // Peers first: they get their colours in the order of the table.
  table.show(view);
  map.show(view);
  map.peer = view.peers.find((peer) => peer.peer_id === chosen) ?? null;
  trace.show(view.trace);
  chat.show(view);
  figures(view);
}

function onLost() {
  by("live").classList.remove("on");
  by("live-text").textContent = "trying again";
  if (latest === null) return;
  document.body.classList.add("stale");
  say("This page has lost its server and shows what was last known", true);
}

/** Asks for an API key, and goes on when one is given. */
function onRefused() {
  by("live-text").textContent = "closed";
  by("door").hidden = false;
  by("door-note").textContent = key.value ? "This key is not one of the server's." : "This server asks for an API key.";
  by("key").focus();
  return new Promise((resolve) => {
    by("door").onsubmit = (event) => {
      event.preventDefault();
      key.value = by("key").value.trim();
      by("door").hidden = true;
      resolve();
    };
  });
}

follow({ onView, onLost, onRefused });

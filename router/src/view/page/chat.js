// A conversation through the OpenAI-compatible API of the same server, and which peers computed the answers.

import { element, peerColour, plural, short, swatch } from "./format.js";
import { authorized, events } from "./stream.js";

const PATH = "/v1/chat/completions";

const share = (part) => (part < 0.01 ? "< 1 %" : `${Math.round(100 * part)} %`);

export class Chat {
  #messages = [];
  #view = null;
  /** The answer in progress. */
  #answer = null;

  constructor({ talk, form, prompt, send, fresh }) {
    Object.assign(this, { talk, form, prompt, send });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#answer) this.#answer.abort.abort();
      else this.#ask();
    });
    prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        if (!this.#answer) this.#ask();
      }
    });
    fresh.addEventListener("click", () => this.#clear());
    this.#clear();
  }

  /** The latest document: whose calls have risen while an answer comes is who computes it. */
  show(view) {
    this.#view = view;
    if (this.#answer) this.#describe(this.#answer);
  }

  #clear() {
    this.#answer?.abort.abort();
    this.#messages = [];
    this.talk.replaceChildren(element("li", "hint", "What you write goes to this server only. Peers see hidden states, never the text."));
  }

  async #ask() {
    const text = this.prompt.value.trim();
    if (!text) return;
    this.prompt.value = "";
    this.talk.querySelector(".hint")?.remove();
    this.#messages.push({ role: "user", content: text });
    this.#add("user", text);
    const body = element("span", "busy");
    const footer = element("footer", "");
    const line = this.#add("assistant", body, footer);
    const answer = { body, footer, line, text: "", tokens: 0, first: 0, last: 0, abort: new AbortController(), before: this.#calls() };
    this.#answer = answer;
    this.send.textContent = "Stop";
    // It is read out when it is whole.
    this.talk.setAttribute("aria-busy", "true");
    const messages = this.#messages;
    try {
      await this.#stream(answer);
    } catch (error) {
      if (error.name !== "AbortError") this.#add("failed", error.message);
    }
    this.#describe(answer);
    body.classList.remove("busy");
    if (answer.text) messages.push({ role: "assistant", content: answer.text });
    else line.remove();
    if (this.#answer === answer) this.#answer = null;
    this.send.textContent = "Send";
    this.talk.setAttribute("aria-busy", "false");
  }

  async #stream(answer) {
    const headers = authorized({ "content-type": "application/json" });
    const body = JSON.stringify({
      model: this.#view?.name, messages: this.#messages, stream: true, stream_options: { include_usage: true },
    });
    const response = await fetch(PATH, { method: "POST", headers, body, signal: answer.abort.signal });
    if (!response.ok) {
      const document = await response.json().catch(() => null);
      throw new Error(document?.error?.message ?? `the server answered ${response.status}`);
    }
    for await (const data of events(response)) this.#take(answer, data);
  }

  #take(answer, data) {
    if (data === "[DONE]" || data === "") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message ?? "the answer failed");
    // The last chunk says how many there were; until then one in each chunk is a good guess.
    answer.tokens = chunk.usage?.completion_tokens ?? answer.tokens;
    const text = chunk.choices?.[0]?.delta?.content ?? "";
    if (text === "") return;
    const atEnd = this.talk.scrollHeight - this.talk.scrollTop - this.talk.clientHeight < 40;
    answer.first ||= performance.now();
    answer.last = performance.now();
    answer.tokens += 1;
    answer.text += text;
    answer.body.append(text);
    if (atEnd) this.talk.scrollTop = this.talk.scrollHeight;
  }

  #calls() {
    return new Map((this.#view?.peers ?? []).map((peer) => [peer.peer_id, peer.calls]));
  }

  #describe(answer) {
    const since = (answer.last - answer.first) / 1000;
    const speed = answer.tokens > 1 && since > 0.2 ? ` · ${((answer.tokens - 1) / since).toFixed(1)} a second` : "";
    const made = [...this.#calls()].map(([peer, calls]) => [peer, calls - (answer.before.get(peer) ?? 0)]).filter(([, calls]) => calls > 0);
    const all = made.reduce((sum, [, calls]) => sum + calls, 0);
    made.sort((a, b) => b[1] - a[1]);
    const peers = made.map(([peer, calls]) => {
      peerColour(peer);
      return element("span", "id", swatch(peer), `${short(peer)} ${share(calls / all)}`);
    });
    if (answer.tokens > 0) answer.footer.replaceChildren(element("span", "", `${plural(answer.tokens, "token")}${speed}`), ...peers);
  }

  #add(kind, ...children) {
    const line = element("li", kind, ...children);
    this.talk.append(line);
    this.talk.scrollTop = this.talk.scrollHeight;
    return line;
  }
}

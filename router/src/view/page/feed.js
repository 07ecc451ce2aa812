// The network's documents as they come, for as long as the page is open.

import { authorized, events } from "./stream.js";

const RETRY_MS = 3000;
/** A server that hangs closes nothing. */
const SILENT_MS = 5000;

/**
 * Calls `onView` with every document, and `onLost` when they stop coming; comes back by itself. Where a key is asked for, it goes on
 * when what `onRefused` gives is done.
 */
export async function follow({ onView, onLost, onRefused }) {
  for (;;) {
    const abort = new AbortController();
    let timer = setTimeout(() => abort.abort(), SILENT_MS);
    try {
      const response = await fetch("/api/events", { headers: authorized(), signal: abort.signal, cache: "no-store" });
      if (response.status === 401) {
        clearTimeout(timer);
        await onRefused();
        continue;
      }
      for await (const data of response.ok ? events(response) : []) {
        clearTimeout(timer);
        timer = setTimeout(() => abort.abort(), SILENT_MS);
        // On its own, so that a defect of the page does not look like a lost server.
        queueMicrotask(() => onView(JSON.parse(data)));
      }
    } catch {
      // The server is gone or silent, as at the end of its events.
    }
    clearTimeout(timer);
    onLost();
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

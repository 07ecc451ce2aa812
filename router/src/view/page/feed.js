// The network's documents as they come, for as long as the page is open.

const RETRY_MS = 3000;
const SILENT_MS = 5000;

/** Calls `onView` with every document, and `onLost` when they stop coming. Comes back by itself. */
export function follow(onView, onLost) {
  let source = null;
  let timer = 0;
  const lost = () => {
    clearTimeout(timer);
    onLost();
    // A browser tries again by itself, except after an answer that is no stream.
    if (source.readyState === EventSource.CLOSED) timer = setTimeout(open, RETRY_MS);
    else timer = setTimeout(open, 2 * RETRY_MS);
  };
  const open = () => {
    source?.close();
    source = new EventSource("/api/events");
    source.onmessage = (event) => {
      clearTimeout(timer);
      // A server that hangs closes nothing.
      timer = setTimeout(lost, SILENT_MS);
      onView(JSON.parse(event.data));
    };
    source.onerror = lost;
  };
  open();
}

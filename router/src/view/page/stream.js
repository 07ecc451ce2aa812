// Server-sent events by fetch, which can carry an API key, as a browser's own EventSource cannot.

const KEY = "hanse-api-key";

/** The key that the reader has given, as long as this window is open. */
export const key = {
  get value() {
    return sessionStorage.getItem(KEY) ?? "";
  },
  set value(text) {
    sessionStorage.setItem(KEY, text);
  },
};

/** The headers of a request for this server. */
export const authorized = (headers = {}) => (key.value ? { ...headers, authorization: `Bearer ${key.value}` } : headers);

/** The data of one event after another. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  }
}

// A network of a model with 58 x 256 experts and sixty peers, in place of the server's events.
window.fetch = async () => {
  const [layers, experts, peers] = [58, 256, 60];
  const random = (() => {
    let state = 7;
    return () => (state = (state * 48271) % 2147483647) / 2147483647;
  })();
  const each = (count, make) => Array.from({ length: count }, (_, at) => make(at));
  const names = each(peers, (at) => `12D3KooW${"x".repeat(36)}${String(at).padStart(8, "0")}`);
  let calls = null;
  const view = () => {
    calls = each(layers, (layer) => each(experts, (expert) => (calls?.[layer][expert] ?? Math.floor(1000 * random() ** 6)) + (random() > 0.97 ? 1 : 0)));
    const replicas = each(layers, (layer) => each(experts, (expert) => (layer === 12 && (expert === 100 || expert === 101) ? 0 : 1 + Math.floor(4 * random() ** 2))));
    const call = (layer, at) => ({ peer_id: names[(layer * 7 + at) % peers], start_ms: layer * 9 + 1, ms: 4 + 3 * random(), compute_ms: 2, rows: 8, experts: 3, hedged: false, retried: false });
    return {
      model_id: "f".repeat(64), name: "a-large-model", chat: false, missing: 2, tokens_per_second: 31.5,
      layers: each(layers, (layer) => ({ layer: layer + 3, experts, replicas: replicas[layer], calls: calls[layer], demand: calls[layer] })),
      peers: names.map((peer_id, at) => ({
        peer_id, state: "connected", round_trip_ms: 20 * random(), path: at % 5 ? "direct" : "relayed", address: "192.0.2.7:4001", reachability: "direct",
        load: random(), experts: 400, loading: 0, hosted: [["3-60", `${(at * 4) % 250}-${((at * 4) % 250) + 6}`]], precision: ["f32", "f16"],
        calls: 900, rows: 4000, mean_ms: 5, p99_ms: 14, failures: 0,
      })),
      engine: { running: 12, waiting: 0, kv_bytes: 1, tokens: 1, prompt_tokens: 1, reused_tokens: 0, steps: 1, preemptions: 0 },
      trace: { age_ms: 100, total_ms: 530, rows: 12, layers: each(layers, (layer) => ({ layer: layer + 3, start_ms: layer * 9 + 1, ms: 7, calls: each(4, (at) => call(layer, at)) })) },
    };
  };
  const send = (stream) => stream.enqueue(new TextEncoder().encode(`data: ${JSON.stringify(view())}\n\n`));
  return new Response(new ReadableStream({ start: (stream) => void setInterval(send, 500, stream) }));
};

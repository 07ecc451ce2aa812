"""hivemind's part of against_hivemind.py: a server of experts, and clients that call them.

    python hivemind_side.py serve EXPERT EXPERTS HIDDEN WIDTH     prints an address, serves until standard input ends
    python hivemind_side.py call ADDRESS SECONDS ROWS CLIENTS     a line of JSON
    python hivemind_side.py mix ADDRESS SECONDS ROWS HIDDEN K OF  the same for a mixture of K of OF experts
    python hivemind_side.py declare MEMBERS EXPERTS               times declaring and finding experts, without servers

EXPERT is `swiglu`, `ffn`, which is hivemind's own feed-forward block, or `empty`, which gives back what it gets.
"""

import json
import multiprocessing
import os
import statistics
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch  # noqa: E402

torch.set_num_threads(1)


class SwiGLU(torch.nn.Module):
    def __init__(self, hidden, width):
        super().__init__()
        self.gate = torch.nn.Linear(hidden, width, bias=False)
        self.up = torch.nn.Linear(hidden, width, bias=False)
        self.down = torch.nn.Linear(width, hidden, bias=False)

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


class Empty(torch.nn.Module):
    def __init__(self, hidden, width):
        super().__init__()
        # Servers want something to look at for the dtype.
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x + 0 * self.nothing


def serve(kind, experts, hidden, width):
    import hivemind
    from hivemind.moe import ModuleBackend, Server
    from hivemind.moe.server.layers import name_to_block
    from hivemind.utils.tensor_descr import BatchTensorDescriptor

    dht = hivemind.DHT(start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    make = {"swiglu": SwiGLU, "empty": Empty, "ffn": lambda hidden, width: name_to_block["ffn"](hidden)}[kind]
    schema = BatchTensorDescriptor(hidden)
    backends = {
        f"expert.{number}": ModuleBackend(
            f"expert.{number}", make(hidden, width).eval(), args_schema=(schema,), outputs_schema=schema, max_batch_size=4096
        )
        for number in range(experts)
    }
    server = Server(dht, backends, num_connection_handlers=2, start=True)
    server.ready.wait()
    print(dht.get_visible_maddrs()[0], flush=True)
    sys.stdin.read()
    server.shutdown()
    dht.shutdown()


def client(address, seconds, rows, begin, results):
    """Calls experts one after another until the time is over."""
    import hivemind
    from hivemind.moe import get_experts

    dht = hivemind.DHT(initial_peers=[address], client_mode=True, start=True)
    experts = [expert for expert in get_experts(dht, [f"expert.{number}" for number in range(16)]) if expert is not None]
    hidden = experts[0].info["forward_schema"][0][0].size[-1]
    x = torch.randn(rows, hidden)
    with torch.no_grad():
        experts[0](x)
        begin.wait()
        times, deadline = [], time.perf_counter() + seconds
        while time.perf_counter() < deadline or len(times) < 2:
            started = time.perf_counter()
            experts[0](x)
            times.append(time.perf_counter() - started)
    results.put(times)
    dht.shutdown()


def call(address, seconds, rows, clients):
    context = multiprocessing.get_context("spawn")
    begin, results = context.Barrier(clients + 1), context.Queue()
    processes = [context.Process(target=client, args=(address, seconds, rows, begin, results)) for _ in range(clients)]
    for process in processes:
        process.start()
    begin.wait()
    began = time.perf_counter()
    times = [duration for _ in processes for duration in results.get()]
    report(rows, clients, times, time.perf_counter() - began)
    for process in processes:
        process.join()


def mix(address, seconds, rows, hidden, k, of):
    import hivemind
    from hivemind.moe import RemoteMixtureOfExperts

    dht = hivemind.DHT(initial_peers=[address], client_mode=True, start=True)
    layer = RemoteMixtureOfExperts(in_features=hidden, grid_size=(of,), dht=dht, uid_prefix="expert.", k_best=k)
    x, times = torch.randn(rows, hidden), []
    with torch.no_grad():
        layer(x)
        began = time.perf_counter()
        while time.perf_counter() < began + seconds or len(times) < 2:
            started = time.perf_counter()
            layer(x)
            times.append(time.perf_counter() - started)
    report(rows, 1, times, time.perf_counter() - began)
    dht.shutdown()


def declare(members, experts):
    import hivemind
    from hivemind.moe import get_experts
    from hivemind.moe.server.dht_handler import declare_experts
    from hivemind.utils import get_dht_time

    own = {"host_maddrs": ["/ip4/127.0.0.1/tcp/0"], "start": True}
    dhts = [hivemind.DHT(**own)]
    dhts += [hivemind.DHT(initial_peers=dhts[0].get_visible_maddrs(), **own) for _ in range(members - 1)]
    uids = [f"expert.{number}" for number in range(experts)]
    shares = [uids[member * experts // members : (member + 1) * experts // members] for member in range(members)]
    began = time.perf_counter()
    expires = get_dht_time() + 300
    stored = [declare_experts(dht, share, expires, wait=False) for dht, share in zip(dhts, shares)]
    assert all(all(future.result().values()) for future in stored)
    declared = time.perf_counter() - began
    client = hivemind.DHT(initial_peers=dhts[0].get_visible_maddrs(), client_mode=True, start=True)
    began = time.perf_counter()
    found = get_experts(client, uids)
    took = time.perf_counter() - began
    assert all(expert is not None for expert in found)
    print(json.dumps({"experts": experts, "declare_s": declared, "find_s": took}), flush=True)
    for dht in [client, *dhts]:
        dht.shutdown()


def report(rows, clients, times, took):
    calls = len(times) / took
    point = {"rows": rows, "clients": clients, "calls_per_second": calls, "rows_per_second": calls * rows}
    print(json.dumps(point | {"p50_ms": statistics.median(times) * 1e3}), flush=True)


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "serve":
        serve(rest[0], *map(int, rest[1:]))
    elif what == "call":
        call(rest[0], float(rest[1]), *map(int, rest[2:]))
    elif what == "declare":
        declare(*map(int, rest))
    else:
        mix(rest[0], float(rest[1]), *map(int, rest[2:]))

//! What `--help` shows at its end: commands to begin with, in lines that fit 80 columns.

#[cfg(test)]
mod tests;

pub(super) const HANSE: &str = "\
Begin with:
  hanse demo                               a network on this machine, checked
  hanse node --model DIR --memory 6GiB     host experts; prints the ADDR to join
  hanse chat --model DIR --bootstrap ADDR  use them
  hanse doctor --bootstrap ADDR            what is wrong, if something is";

pub(super) const DEMO: &str = "\
Examples:
  hanse demo
  hanse demo --kill --nodes 6 --replicas 3
  hanse demo --model DIR --prompt 'Once upon a time' --json";

pub(super) const NODE: &str = "\
Examples:
  hanse node --model DIR --memory 6GiB
  hanse node --model ID --memory 2GiB \\
    --bootstrap /ip4/192.0.2.7/udp/4001/quic-v1/p2p/12D3...
  hanse node --model DIR --experts 0-11:0-63 \\
    --listen /ip4/0.0.0.0/udp/4001/quic-v1 --data-listen 0.0.0.0:4002
  hanse node --model DIR --device cuda:0,cuda:1 --memory 40GiB --bootstrap ADDR
  hanse node --model DIR --memory 6GiB --bootstrap ADDR --plan
  hanse node --model DIR --memory 6GiB --bootstrap ADDR \\
    --max-cores 4 --quiet-hours 18:00-23:00";

pub(super) const PAUSE: &str = "\
Examples:
  hanse pause
  hanse pause --data-dir /var/lib/hanse";

pub(super) const RESUME: &str = "\
Examples:
  hanse resume
  hanse resume --data-dir /var/lib/hanse";

pub(super) const READY: &str = "\
Examples:
  hanse ready
  until hanse ready --data-dir /var/lib/hanse; do sleep 1; done";

pub(super) const GENERATE: &str = "\
Examples:
  hanse generate --model DIR --bootstrap ADDR --prompt 'Once upon a time'
  hanse generate --model DIR --local --prompt 'Once upon a time' \\
    --temperature 0.8 --seed 7
  hanse generate --model DIR --bootstrap ADDR --prompt 'Once upon a time' \\
    --device cuda:0
  hanse generate --model ID --bootstrap ADDR --prompt-ids 1,2,3 \\
    --max-tokens 16 --json";

pub(super) const CHAT: &str = "\
Examples:
  hanse chat --model DIR --bootstrap ADDR
  hanse chat --model ID --bootstrap ADDR \\
    --system 'Answer in one sentence.' --temperature 0.7
  echo 'What is the Hanseatic League?' | hanse chat --model DIR --bootstrap ADDR";

pub(super) const SCORE: &str = "\
Examples:
  hanse score --model DIR --file page.txt
  hanse score --model DIR --bootstrap ADDR --prompt 'Once upon a time' --json
  hanse score --model DIR --prompt-ids 1,2,3 --logits-out logits.safetensors";

pub(super) const STATUS: &str = "\
Examples:
  hanse status --bootstrap ADDR
  hanse status --bootstrap ADDR --watch
  hanse status --bootstrap ADDR --web
  hanse status --mdns --model ID --json";

pub(super) const INSPECT: &str = "\
Examples:
  hanse inspect --model DIR
  hanse inspect --model DIR --json";

pub(super) const MANIFEST: &str = "\
Examples:
  hanse manifest DIR
  hanse manifest DIR --out hanse-manifest.json --data-dir ~/.hanse-publisher";

pub(super) const QUANTIZE: &str = "\
Examples:
  hanse quantize DIR --to q8_0 --out DIR-q8_0
  hanse quantize DIR --to q4_k --trunk q8_0 --out DIR-q4_k";

pub(super) const BENCH: &str = "\
Examples:
  hanse bench
  hanse bench --part limits,wire,floor
  hanse bench --part experts,trunk --model DIR
  hanse bench --part trunk --model DIR --device cuda:0
  hanse bench --drafts 20ms,80ms --rounds 2
  hanse bench --curves DIR --rounds 3
  hanse bench --model DIR --nodes 4 --wire f16 --json";

pub(super) const DOCTOR: &str = "\
Examples:
  hanse doctor
  hanse doctor --bootstrap ADDR --model ID --memory 6GiB
  hanse doctor --bootstrap ADDR --listen /ip4/0.0.0.0/udp/4001/quic-v1 \\
    --data-dir /var/lib/hanse --json";

pub(super) const CARVE: &str = "\
Examples:
  hanse carve SmolLM2-135M --slices 4 --out SmolLM2-135M-carved
  hanse carve DIR --slices 16 --out DIR2 --json";

pub(super) const IMPORT: &str = "\
Examples:
  hanse import SmolLM2-135M-Instruct.Q4_1.gguf --out SmolLM2-135M
  hanse import Qwen3-30B-A3B-Q4_K_M.gguf --out Qwen3-30B-A3B --to bf16";

pub(super) const COMPLETIONS: &str = "\
Examples:
  hanse completions bash > ~/.local/share/bash-completion/completions/hanse
  hanse completions zsh > ~/.zfunc/_hanse
  hanse completions fish > ~/.config/fish/completions/hanse.fish";

pub(super) const MAN: &str = "\
Examples:
  hanse man | man -l -
  hanse man ~/.local/share/man/man1 && man hanse-node";

#[cfg(unix)]
pub(super) mod testnet {
    //! Those of `hanse testnet`.

    pub(in super::super) const TESTNET: &str = "\
Examples:
  hanse testnet up --nodes 8 --rtt 20ms
  hanse testnet kill 3
  hanse testnet heal
  hanse testnet down
  hanse testnet chaos --seconds 60";

    pub(in super::super) const UP: &str = "\
Examples:
  hanse testnet up
  hanse testnet up --nodes 8 --rtt 20ms --jitter 5ms --loss 1% --kill-every 10s
  hanse testnet up --model DIR --unequal 7 --state /tmp/net --json";

    pub(in super::super) const STATUS: &str = "\
Examples:
  hanse testnet status
  hanse testnet status --state /tmp/net --json";

    pub(in super::super) const KILL: &str = "\
Examples:
  hanse testnet kill 3
  hanse testnet kill 3 --state /tmp/net";

    pub(in super::super) const PAUSE: &str = "\
Examples:
  hanse testnet pause 3
  hanse testnet pause 3 --state /tmp/net";

    pub(in super::super) const RESUME: &str = "\
Examples:
  hanse testnet resume 3
  hanse testnet resume 3 --state /tmp/net";

    pub(in super::super) const RESTART: &str = "\
Examples:
  hanse testnet restart 3
  hanse testnet restart 3 --state /tmp/net";

    pub(in super::super) const SLOW: &str = "\
Examples:
  hanse testnet slow 3
  hanse testnet slow 3 --times 4 --state /tmp/net";

    pub(in super::super) const CUT: &str = "\
Examples:
  hanse testnet cut 3
  hanse testnet cut 3 --to --state /tmp/net";

    pub(in super::super) const HEAL: &str = "\
Examples:
  hanse testnet heal
  hanse testnet heal --state /tmp/net";

    pub(in super::super) const DOWN: &str = "\
Examples:
  hanse testnet down
  hanse testnet down --state /tmp/net";

    pub(in super::super) const CHAOS: &str = "\
Examples:
  hanse testnet chaos
  hanse testnet chaos --seconds 60 --seed 7 --nodes 5 --replicas 2 --json";
}

//! Namespaces, routers, and the processes in them.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::programs::{Generated, Generation, Node};

/// What is waited for comes within this, or the test fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// Router A's outer address.
pub(crate) const ROUTER_A: &str = "11.22.33.101";
pub(crate) const PROMPT: &str = "The harbour of Lübeck";
pub(crate) const TOKENS: &str = "48";
/// So many take a while.
pub(crate) const MANY_TOKENS: &str = "400";

pub(crate) fn tiny_moe() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("examples/models/tiny-moe")
}

/// How a router chooses the outer port of a connection.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Nat {
    /// The inner port if it is free, as most home routers do: holes can be punched.
    KeepsPorts,
    /// Another one for every destination: they cannot.
    Symmetric,
}

/// The world of one test; its namespaces vanish with it.
pub(crate) struct World {
    prefix: String,
    spaces: Vec<String>,
}

impl Drop for World {
    fn drop(&mut self) {
        for space in &self.spaces {
            // What cannot be removed was not made.
            let _ = Command::new("ip").args(["netns", "del", space]).output();
            let _ = std::fs::remove_dir_all(Path::new("/etc/netns").join(space));
        }
    }
}

/// The chains that miniupnpd fills.
const UPNP_RULES: &str = "
table inet upnp {
    chain forward { type filter hook forward priority 0; policy accept; jump ports; }
    chain prerouting { type nat hook prerouting priority -100; policy accept; jump inward; }
    chain postrouting { type nat hook postrouting priority 100; policy accept; jump outward; }
    chain ports { }
    chain inward { }
    chain outward { }
}
";

const UPNP_CONFIG: &str = "
ext_ifname=eth0
listening_ip=lan
port=0
enable_upnp=yes
enable_natpmp=no
secure_mode=yes
uuid=00000000-0000-4000-8000-000000000001
upnp_table_name=upnp
upnp_nat_table_name=upnp
upnp_forward_chain=ports
upnp_nat_chain=inward
upnp_nat_postrouting_chain=outward
allow 1024-65535 10.0.0.0/8 1024-65535
deny 0-65535 0.0.0.0/0 0-65535
";

/// A router's daemon that opens ports for those behind it.
pub(crate) struct Upnpd {
    child: Child,
    _home: TempDir,
}

impl Drop for Upnpd {
    fn drop(&mut self) {
        // It may have failed meanwhile.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Says why a test is not done, and fails if all have to be.
fn skipped(reason: &str) {
    assert!(!std::env::var("HANSE_NAT_TESTS").is_ok_and(|value| value == "require"), "{reason}");
    eprintln!("skipped: {reason}");
}

/// Runs a program to its end; its output if it fails.
pub(crate) fn tool(line: &str) -> Result<(), String> {
    let mut words = line.split_whitespace();
    let output = Command::new(words.next().unwrap_or_default())
        .args(words)
        .output()
        .map_err(|error| format!("{line}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{line}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

impl World {
    /// `None` where namespaces may not be made, after saying why.
    pub(crate) fn new(nat: Nat) -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let prefix = format!("hanse-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let mut world = Self { prefix, spaces: Vec::new() };
        match world.build(nat) {
            Ok(()) => Some(world),
            Err(reason) => {
                skipped(&format!("cannot make namespaces: {reason}"));
                None
            }
        }
    }

    /// Has `router` take orders for ports (UPnP), as most home routers do; `None` where miniupnpd is missing, after saying so.
    pub(crate) fn takes_orders(&self, router: &str) -> Option<Upnpd> {
        let home = tempfile::tempdir().unwrap();
        let (rules, config) = (home.path().join("rules"), home.path().join("config"));
        std::fs::write(&rules, UPNP_RULES).unwrap();
        std::fs::write(&config, UPNP_CONFIG).unwrap();
        let (rules, config) = (rules.display(), config.display());
        let started = self.inside(router, &format!("nft -f {rules}")).and_then(|()| {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", &self.name(router), "miniupnpd", "-d", "-f", &config.to_string(), "-P"]);
            command.arg(home.path().join("pid")).stdin(Stdio::null());
            let log = std::fs::File::create(home.path().join("log")).unwrap();
            let mut child = command.stdout(log.try_clone().unwrap()).stderr(log).spawn().map_err(|e| e.to_string())?;
            // It writes its id once it listens.
            while !home.path().join("pid").exists() {
                if child.try_wait().unwrap().is_some() {
                    return Err(std::fs::read_to_string(home.path().join("log")).unwrap());
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(child)
        });
        match started {
            Ok(child) => Some(Upnpd { child, _home: home }),
            Err(reason) => {
                skipped(&format!("no router that takes orders: {reason}"));
                None
            }
        }
    }

    /// What a program says.
    pub(crate) fn says(&self, space: &str, line: &str) -> String {
        let output =
            Command::new("ip").args(["netns", "exec", &self.name(space)]).args(line.split(' ')).output().unwrap();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Counts the bytes that `space` sends to a UDP socket, from now on; see [`Self::sent`].
    pub(crate) fn count(&self, space: &str, ip: &str, port: u16) {
        self.inside(space, &format!("iptables -I OUTPUT -p udp -d {ip} --dport {port} -j ACCEPT")).unwrap();
    }

    /// The bytes counted, with headers.
    pub(crate) fn sent(&self, space: &str) -> u64 {
        let rules = self.says(space, "iptables -nvxL OUTPUT");
        let rule = rules.lines().find(|line| line.contains("dpt:")).expect("a rule that counts");
        rule.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    fn name(&self, space: &str) -> String {
        format!("{}-{space}", self.prefix)
    }

    fn add(&mut self, space: &str) -> Result<(), String> {
        let name = self.name(space);
        tool(&format!("ip netns add {name}"))?;
        self.spaces.push(name);
        self.inside(space, "ip link set lo up")
    }

    pub(crate) fn inside(&self, space: &str, line: &str) -> Result<(), String> {
        tool(&format!("ip netns exec {} {line}", self.name(space)))
    }

    /// A cable from `space` (its end named `end`, with an address) to `other`.
    fn cable(&self, space: &str, end: &str, address: &str, other: &str, other_end: &str) -> Result<(), String> {
        let (space_name, other_name) = (self.name(space), self.name(other));
        tool(&format!("ip link add {end} netns {space_name} type veth peer name {other_end} netns {other_name}"))?;
        self.inside(space, &format!("ip address add {address} dev {end}"))?;
        self.inside(space, &format!("ip link set {end} up"))?;
        self.inside(other, &format!("ip link set {other_end} up"))
    }

    fn build(&mut self, nat: Nat) -> Result<(), String> {
        self.add("world")?;
        self.inside("world", "ip link add street type bridge")?;
        self.inside("world", "ip link set street up")?;
        for (space, address) in [("boot", "11.22.33.10/24"), ("client", "11.22.33.20/24")] {
            self.add(space)?;
            self.on_street(space, address)?;
        }
        for (router, home, number) in [("router-a", "home-a", 1), ("router-b", "home-b", 2)] {
            self.add(router)?;
            self.add(home)?;
            self.on_street(router, &format!("11.22.33.{}/24", 100 + number))?;
            self.cable(router, "lan", &format!("10.1.{number}.1/24"), home, "eth0")?;
            self.inside(home, &format!("ip address add 10.1.{number}.2/24 dev eth0"))?;
            self.inside(home, &format!("ip route add default via 10.1.{number}.1"))?;
            self.inside(router, "sysctl -q -w net.ipv4.ip_forward=1")?;
            let ports = if nat == Nat::Symmetric { "--random" } else { "" };
            self.inside(router, &format!("iptables -t nat -A POSTROUTING -o eth0 -j MASQUERADE {ports}"))?;
            // As routers do: what nobody inside asked for is dropped without an answer.
            self.inside(router, "iptables -A INPUT -i eth0 -j DROP")?;
        }
        Ok(())
    }

    /// Another machine on the street.
    pub(crate) fn moves_in(&mut self, space: &str, address: &str) {
        self.add(space).and_then(|()| self.on_street(space, &format!("{address}/24"))).unwrap();
    }

    /// Gives a machine another address in place of its own.
    pub(crate) fn readdress(&self, space: &str, from: &str, to: &str) {
        self.inside(space, &format!("ip address del {from}/24 dev eth0")).unwrap();
        self.inside(space, &format!("ip address add {to}/24 dev eth0")).unwrap();
    }

    /// Where the name "harbour" leads, as programs in `space` that are started from now on see it.
    pub(crate) fn harbour(&self, space: &str, ip: &str) {
        let folder = Path::new("/etc/netns").join(self.name(space));
        std::fs::create_dir_all(&folder).unwrap();
        // In place, since running programs see the file and not its name.
        std::fs::write(folder.join("hosts"), format!("127.0.0.1 localhost\n{ip} harbour\n")).unwrap();
    }

    fn on_street(&self, space: &str, address: &str) -> Result<(), String> {
        self.cable(space, "eth0", address, "world", space)?;
        self.inside("world", &format!("ip link set {space} master street"))
    }

    fn hanse(&self, space: &str, home: &TempDir) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name(space), env!("CARGO_BIN_EXE_hanse")]);
        for name in ["HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "TMPDIR"] {
            command.env(name, home.path());
        }
        command.env("HANSE_LOG", "hanse_router=debug,hanse_protocol=debug").env_remove("RUST_BACKTRACE");
        command.stdin(Stdio::null());
        command
    }

    pub(crate) fn node(&self, space: &str, args: &[&str]) -> Node {
        let home = tempfile::tempdir().unwrap();
        let log = home.path().join("log");
        let mut command = self.hanse(space, &home);
        command.args(["node", "--json", "--threads", "1", "--model"]).arg(tiny_moe()).args(args);
        let errors = std::fs::File::create(&log).unwrap();
        let mut child = command.stdout(Stdio::piped()).stderr(errors).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let ready = serde_json::from_str(&line)
            .unwrap_or_else(|error| panic!("ready line {line:?}: {error}: {}", std::fs::read_to_string(&log).unwrap()));
        Node { child, ready, log, _home: home }
    }

    pub(crate) fn bootstrap(&self) -> Node {
        self.bootstrap_at("11.22.33.10")
    }

    /// The bootstrap member, on one of its machine's addresses.
    pub(crate) fn bootstrap_at(&self, ip: &str) -> Node {
        let (quic, tcp) = (format!("/ip4/{ip}/udp/4001/quic-v1"), format!("/ip4/{ip}/tcp/4001"));
        self.node("boot", &["--experts", "none", "--listen", &quic, &tcp])
    }

    /// Runs the client to its end.
    pub(crate) fn client(&self, args: &[&str]) -> Output {
        self.runs("client", args)
    }

    /// Runs the program to its end.
    pub(crate) fn runs(&self, space: &str, args: &[&str]) -> Output {
        self.hanse(space, &tempfile::tempdir().unwrap()).args(args).output().unwrap()
    }

    pub(crate) fn generate(&self, bootstrap: &str) -> Generated {
        self.generation("client", bootstrap, TOKENS).end()
    }

    pub(crate) fn generation(&self, space: &str, bootstrap: &str, tokens: &str) -> Generation {
        // Without drafts, which would have it end sooner than what is to happen meanwhile.
        let args = ["generate", "--json", "--draft", "none", "--prompt", PROMPT, "--max-tokens", tokens];
        self.client_of(space, bootstrap, &args, "")
    }

    /// A client that asks again and again, for longer than one generation takes.
    pub(crate) fn conversation(&self, space: &str, bootstrap: &str) -> Generation {
        let questions = format!("{PROMPT}\n").repeat(100);
        self.client_of(space, bootstrap, &["chat", "--temperature", "0", "--max-tokens", TOKENS], &questions)
    }

    fn client_of(&self, space: &str, bootstrap: &str, args: &[&str], input: &str) -> Generation {
        let home = tempfile::tempdir().unwrap();
        let [document, log, questions] = ["document", "log", "questions"].map(|name| home.path().join(name));
        std::fs::write(&questions, input).unwrap();
        let mut command = self.hanse(space, &home);
        command.args(args).args(["--threads", "1", "--join-timeout", "60", "--bootstrap", bootstrap, "--model"]);
        let file = |path| std::fs::File::create(path).unwrap();
        command.arg(tiny_moe()).stdin(std::fs::File::open(questions).unwrap());
        let child = command.stdout(file(&document)).stderr(file(&log)).spawn().unwrap();
        Generation { child, document, log, _home: home }
    }

    /// The reachability that `hanse status` shows of `peer`.
    pub(crate) fn reachability(&self, bootstrap: &str, peer: &str) -> String {
        let output = self.client(&["status", "--json", "--bootstrap", bootstrap]);
        let document: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let peers = document["peers"].as_array().cloned().unwrap_or_default();
        let row = peers.iter().find(|row| row["peer_id"] == *peer);
        row.and_then(|row| row["reachability"].as_str()).unwrap_or_default().to_owned()
    }
}

/// Polls until `condition` holds.
pub(crate) fn waits_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

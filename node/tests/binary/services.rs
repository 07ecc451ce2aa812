//! The services that the documentation shows, as systemd sees them.

use std::process::Command;

use crate::{home, root, text};

#[test]
fn systemd_finds_nothing_wrong_with_the_documented_services() {
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        eprintln!("skipped: there is no systemd-analyze here");
        return;
    }
    let dir = home();
    for page in ["run-a-volunteer.md", "operate-a-gateway.md"] {
        let page = std::fs::read_to_string(root().join("docs").join(page)).unwrap();
        let (_, service) = page.split_once("```ini\n").unwrap();
        let (service, _) = service.split_once("```").unwrap();
        let name = service.lines().next().unwrap().strip_prefix("# /etc/systemd/system/").unwrap();
        let path = dir.path().join(name);
        // Where it is to be installed there is nothing yet.
        let service = service.replace("/usr/local/bin/hanse", env!("CARGO_BIN_EXE_hanse"));
        std::fs::write(&path, service).unwrap();
        let output = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&path).output().unwrap();
        let found = text(&output.stdout) + &text(&output.stderr);
        assert!(output.status.success() && !found.contains(name), "{name}: {found}");
    }
}

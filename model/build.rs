//! Says which cards this build computes on: `cfg(cards)` if on any, and `cfg(cards = "cuda")` or `cfg(cards = "metal")`.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(cards, values(none(), \"cuda\", \"metal\"))");
    let has_feature = |name: &str| std::env::var_os(format!("CARGO_FEATURE_{name}")).is_some();
    let is_apple = std::env::var("CARGO_CFG_TARGET_VENDOR").is_ok_and(|vendor| vendor == "apple");
    // NVIDIA has no driver for Apple's systems, so no build has both.
    let cards = if is_apple && has_feature("METAL") {
        "metal"
    } else if !is_apple && has_feature("CUDA") {
        "cuda"
    } else {
        return;
    };
    println!("cargo::rustc-cfg=cards");
    println!("cargo::rustc-cfg=cards=\"{cards}\"");
}

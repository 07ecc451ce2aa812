#!/usr/bin/env bash
# What can be told of the Metal backend without a Mac, beside what emulated.sh computes: that kernels.metal keeps address spaces apart, and
# that the driver's side, and the program, compile for one. Needs python3 with pip and PyPI, for a C compiler that knows Apple's headers, and Rust's standard
# library for the target (`rustup target add aarch64-apple-darwin`; or its source, and the option -Zbuild-std).
#
#   tests/cuda/metal/check.sh [OPTIONS OF CARGO]
set -euo pipefail
cd "$(dirname "$0")/../../.."

tools="${HANSE_CUDA_TOOLS:-$HOME/.cache/hanse}/zig-tools"
if [ ! -e "$tools/ready" ]; then
    rm -rf "$tools"
    python3 -m pip install --quiet --no-deps --target "$tools" ziglang
    touch "$tools/ready"
fi
zig="$tools/ziglang/zig"

"$zig" c++ -std=c++17 -c -Wall -Wextra -Werror -Wno-unknown-attributes -Wno-unknown-pragmas -Itests/cuda/metal -o "$tools/kernels.o" \
    -x c++ model/src/cards/metal/kernels.metal
echo "kernels.metal keeps address spaces apart"

# cargo asks it for objects of parts in C, which are not linked.
compiler="$tools/cc"
cat > "$compiler" << END
#!/usr/bin/env bash
options=()
for option in "\$@"; do case "\$option" in --target=* | -mmacosx-version-min=*) ;; *) options+=("\$option") ;; esac; done
exec "$zig" cc -target aarch64-macos "\${options[@]}"
END
chmod +x "$compiler"
export CC_aarch64_apple_darwin="$compiler" CXX_aarch64_apple_darwin="$compiler" AR_aarch64_apple_darwin="$compiler-ar" SDKROOT="$tools"
printf '#!/usr/bin/env bash\nexec "%s" ar "$@"\n' "$zig" > "$compiler-ar"
chmod +x "$compiler-ar"
cargo check --target aarch64-apple-darwin -p hanse-model --features metal --all-targets "$@"
cargo check --target aarch64-apple-darwin -p hanse-node --features metal "$@"

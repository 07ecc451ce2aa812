//! The command line of `hanse gateway`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

use super::{ClientArgs, DraftArgs};

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hanse gateway --model DIR --bootstrap ADDR
  hanse gateway --model ID --bootstrap ADDR --listen 0.0.0.0:8080 \\
    --api-key-file keys.txt
  curl http://127.0.0.1:8080/v1/chat/completions \\
    -H 'content-type: application/json' -d '{\"model\": \"tiny-moe\",
    \"messages\": [{\"role\": \"user\", \"content\": \"Once upon a time\"}]}'")]
pub(crate) struct GatewayArgs {
    #[command(flatten)]
    pub(crate) client: ClientArgs,
    #[command(flatten)]
    pub(crate) draft: DraftArgs,
    /// Where to serve.
    #[arg(long, default_value = "127.0.0.1:8080", value_name = "IP:PORT")]
    pub(crate) listen: SocketAddr,
    /// The model's name for those who ask; by default the folder's or the repository's name, or the model's id, which is understood
    /// in any case.
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// A file with an API key on each line: only who has one may ask. Everybody may by default.
    #[arg(long, value_name = "FILE")]
    pub(crate) api_key_file: Option<PathBuf>,
    /// An origin whose web pages may ask from a browser, such as `https://example.org`; may be given more than once.
    #[arg(long, value_name = "ORIGIN")]
    pub(crate) cors_origin: Vec<String>,
    /// Memory for the keys and values of all requests together; bounds the context too.
    #[arg(long, default_value = "4GiB", value_name = "SIZE")]
    pub(crate) kv_memory: bytesize::ByteSize,
    /// Requests that advance together.
    #[arg(long, default_value_t = 256, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub(crate) max_sequences: u32,
    /// Requests that may wait to join them; more are refused with status 429.
    #[arg(long, default_value_t = 256, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub(crate) max_waiting: u32,
    /// The largest request; eight of the largest may be read at a time.
    #[arg(long, default_value = "4MiB", value_name = "SIZE")]
    pub(crate) max_body: bytesize::ByteSize,
    /// Seconds that requests in flight may go on after the gateway was told to end.
    #[arg(long, default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(..=86_400))]
    pub(crate) drain: u64,
    /// Print one JSON document when ready, with `url` and `model`.
    #[arg(long)]
    pub(crate) json: bool,
}

//! How fast rows are written in each wire dtype, and read.

use std::time::Instant;

use hanse_protocol::WireDtype;
use serde::Serialize;

use crate::output::say;

const WIDTH: usize = 2048;
/// A megabyte of values: in the second cache, as rows of a call are.
const ROWS: usize = 128;
/// The best of so many, since other programs only ever slow a measurement down.
const REPEATS: usize = 50;

#[derive(Serialize)]
pub(super) struct Report {
    row_values: usize,
    dtypes: Vec<Speed>,
}

#[derive(Serialize)]
struct Speed {
    dtype: String,
    /// Bytes of a row, as a share of those of f32.
    size: f64,
    /// Gigabytes (1e9) of f32 values a second, on one core.
    encode_gbs: f64,
    decode_gbs: f64,
}

pub(super) fn run() -> anyhow::Result<Report> {
    let values: Vec<f32> = (0..ROWS * WIDTH).map(|i| ((i * 7919 % 4001) as f32 - 2000.0) / 1000.0).collect();
    let gbs = |seconds: f64| (values.len() * 4) as f64 / seconds / 1e9;
    let mut dtypes = Vec::new();
    for dtype in WireDtype::ALL {
        let mut bytes = Vec::new();
        let (mut encode, mut decode) = (f64::MAX, f64::MAX);
        for _ in 0..REPEATS {
            bytes.clear();
            let started = Instant::now();
            dtype.encode_into(&values, WIDTH, &mut bytes)?;
            encode = encode.min(started.elapsed().as_secs_f64());
            let started = Instant::now();
            std::hint::black_box(dtype.decode(std::hint::black_box(&bytes), ROWS, WIDTH)?);
            decode = decode.min(started.elapsed().as_secs_f64());
        }
        dtypes.push(Speed {
            dtype: dtype.to_string(),
            size: dtype.row_bytes(WIDTH) as f64 / WireDtype::F32.row_bytes(WIDTH) as f64,
            encode_gbs: gbs(encode),
            decode_gbs: gbs(decode),
        });
    }
    Ok(Report { row_values: WIDTH, dtypes })
}

impl Report {
    pub(super) fn print(&self) -> anyhow::Result<()> {
        say!("wire       rows of {} values, GB of f32 a second on one core", self.row_values);
        for Speed { dtype, size, encode_gbs, decode_gbs } in &self.dtypes {
            say!("           {dtype:<5} {size:.3} of the bytes; written {encode_gbs:.1}, read {decode_gbs:.1}");
        }
        Ok(())
    }
}

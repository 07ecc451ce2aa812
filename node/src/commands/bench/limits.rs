//! What this machine does at best: the limits beside which everything else is read.

use std::time::{Duration, Instant};

use hanse_model::peak::{multiply_add, read_through};
use serde::Serialize;

use super::Micros;
use crate::output::say;

/// Far more than any cache holds.
const READ_BYTES: usize = 512 << 20;
/// Some milliseconds of work.
const FMA_ROUNDS: usize = 1 << 20;
/// The best of so many, since other programs only ever slow a measurement down.
const REPEATS: usize = 5;
/// Round trips of bare UDP.
const ECHOES: usize = 2000;
/// Payload of a datagram with a row of 2048 values in f32 and the frame around it.
const DATAGRAM: usize = 8192 + 128;
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Serialize)]
pub(super) struct Report {
    cores: usize,
    /// Streaming reads, in gigabytes (1e9) a second.
    read_gbs_one_core: f64,
    read_gbs_all_cores: f64,
    /// f32 multiplications and additions, 1e9 a second.
    gflops_one_core: f64,
    gflops_all_cores: f64,
    /// A datagram to another thread and back, blocking sockets on loopback.
    udp_bytes: usize,
    udp_us: Micros,
}

pub(super) fn run() -> anyhow::Result<Report> {
    let cores = std::thread::available_parallelism()?.get();
    let values = vec![1.0f32; READ_BYTES / 4];
    let read = |threads: usize| {
        let part = values.len() / threads;
        let time = best_of(threads, |thread| {
            std::hint::black_box(read_through(&values[thread * part..(thread + 1) * part]));
        });
        (part * threads * 4) as f64 / time.as_secs_f64() / 1e9
    };
    let flops = |threads: usize| {
        let time = best_of(threads, |_| {
            std::hint::black_box(multiply_add(FMA_ROUNDS));
        });
        (multiply_add(1) * FMA_ROUNDS as u64 * threads as u64) as f64 / time.as_secs_f64() / 1e9
    };
    Ok(Report {
        cores,
        read_gbs_one_core: read(1),
        read_gbs_all_cores: read(cores),
        gflops_one_core: flops(1),
        gflops_all_cores: flops(cores),
        udp_bytes: DATAGRAM,
        udp_us: Micros::of(&udp_round_trips()?),
    })
}

/// The shortest time in which `work` is done by so many threads at once.
fn best_of(threads: usize, work: impl Fn(usize) + Sync) -> Duration {
    let time = || {
        let started = Instant::now();
        std::thread::scope(|scope| {
            for thread in 1..threads {
                let work = &work;
                scope.spawn(move || work(thread));
            }
            work(0);
        });
        started.elapsed()
    };
    (0..REPEATS).map(|_| time()).min().unwrap_or_default()
}

fn udp_round_trips() -> std::io::Result<Vec<Duration>> {
    let socket = || {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok::<_, std::io::Error>(socket)
    };
    let (near, far) = (socket()?, socket()?);
    near.connect(far.local_addr()?)?;
    far.connect(near.local_addr()?)?;
    std::thread::scope(|scope| {
        let echo = scope.spawn(move || {
            let mut bytes = vec![0; DATAGRAM];
            for _ in 0..ECHOES {
                let length = far.recv(&mut bytes)?;
                far.send(&bytes[..length])?;
            }
            Ok(())
        });
        let mut bytes = vec![7; DATAGRAM];
        let mut times = Vec::with_capacity(ECHOES);
        for _ in 0..ECHOES {
            let started = Instant::now();
            near.send(&bytes)?;
            near.recv(&mut bytes)?;
            times.push(started.elapsed());
        }
        echo.join().unwrap_or_else(|_| Err(std::io::Error::other("the echo panicked")))?;
        Ok(times)
    })
}

impl Report {
    pub(super) fn print(&self) -> anyhow::Result<()> {
        let Self { cores, read_gbs_one_core, read_gbs_all_cores, gflops_one_core, gflops_all_cores, .. } = self;
        say!(
            "limits     reading memory: one core {read_gbs_one_core:.1} GB/s, {cores} cores {read_gbs_all_cores:.1} GB/s"
        );
        say!(
            "           f32 multiply-add: one core {gflops_one_core:.0} GFLOP/s, {cores} cores {gflops_all_cores:.0} GFLOP/s"
        );
        say!("           a datagram of {} bytes and back: {}", self.udp_bytes, self.udp_us);
        Ok(())
    }
}

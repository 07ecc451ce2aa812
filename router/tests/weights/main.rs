//! Fetching into the cache: interrupted, from sources that lie, fail and stall, beside other processes, on a full disk.

mod cache;
mod many;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use hanse_protocol::{Blob, BlobHash, GROUP_BYTES, TreeBuilder};
use hanse_router::weights::{Cache, FetchError, Fetcher, Item, Source, SourceError, What};

const GROUP: usize = GROUP_BYTES as usize;
const PATIENCE: Duration = Duration::from_secs(5);

fn noise(bytes: usize, seed: u32) -> Bytes {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..bytes).map(|_| next()).collect::<Vec<_>>().into()
}

fn item(content: &Bytes) -> Item {
    let blob = Blob { hash: BlobHash::of(content), bytes: content.len() as u64 };
    Item { what: What::Trunk("weights".into()), blob }
}

/// How a source behaves.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Habit {
    Honest,
    /// Changes a byte of every group; its chaining values are right.
    Corrupts,
    /// Gives wrong chaining values too.
    LiesOfTheTree,
    Fails,
    /// Never answers a read.
    Hangs,
    /// Knows no chaining values, as a web server.
    Plain,
    PlainCorrupts,
}

#[derive(Debug)]
struct Memory {
    name: &'static str,
    habit: Habit,
    content: Bytes,
    reads: AtomicUsize,
    /// After so many reads all of them wait for ever.
    stop_after: AtomicUsize,
    stopped: AtomicBool,
}

fn memory(name: &'static str, habit: Habit, content: &Bytes) -> Arc<Memory> {
    let (reads, stop_after) = (AtomicUsize::new(0), AtomicUsize::new(usize::MAX));
    Arc::new(Memory { name, habit, content: content.clone(), reads, stop_after, stopped: AtomicBool::new(false) })
}

impl Source for Memory {
    fn name(&self) -> String {
        self.name.to_owned()
    }

    fn parallel(&self) -> usize {
        2
    }

    fn read<'a>(&'a self, _: &'a Item, range: Range<u64>) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        async move {
            tokio::task::yield_now().await;
            let read = self.reads.fetch_add(1, Ordering::SeqCst);
            if read >= self.stop_after.load(Ordering::SeqCst) {
                self.stopped.store(true, Ordering::SeqCst);
                return std::future::pending().await;
            }
            let data = self.content.slice(range.start as usize..range.end as usize);
            match self.habit {
                Habit::Honest | Habit::Plain => Ok(data),
                Habit::Corrupts | Habit::LiesOfTheTree | Habit::PlainCorrupts => {
                    let mut wrong = data.to_vec();
                    wrong[0] ^= 1;
                    Ok(wrong.into())
                }
                Habit::Fails => Err(SourceError::Failed("out of order".into())),
                Habit::Hangs => std::future::pending().await,
            }
        }
        .boxed()
    }

    fn tree<'a>(&'a self, _: &'a Item) -> BoxFuture<'a, Result<Option<Bytes>, SourceError>> {
        async move {
            let mut builder = TreeBuilder::new();
            builder.update(&self.content);
            let list = builder.finish().list().to_vec();
            match self.habit {
                Habit::Plain | Habit::PlainCorrupts => Ok(None),
                Habit::Fails => Err(SourceError::Failed("out of order".into())),
                Habit::LiesOfTheTree => Ok(Some(list.into_iter().map(|byte| byte ^ 1).collect())),
                _ => Ok(Some(list.into())),
            }
        }
        .boxed()
    }
}

fn fetcher(dir: &Path, sources: &[Arc<Memory>], patience: Duration) -> Fetcher {
    let sources = sources.iter().map(|source| source.clone() as Arc<dyn Source>).collect();
    Fetcher::new(Cache::new(dir, u64::MAX).unwrap(), sources, None, patience)
}

fn cached(cache: &Cache, blob: &Blob) -> Option<Vec<u8>> {
    let mut opened = cache.open(blob).unwrap()?;
    let mut content = Vec::new();
    std::io::Read::read_to_end(&mut opened.file, &mut content).unwrap();
    Some(content)
}

fn run<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(60), future).await.expect("it ends") })
}

#[test]
fn blobs_of_every_kind_of_length_arrive_whole() {
    run(async {
        for bytes in [1, 1000, GROUP - 1, GROUP, GROUP + 1, 3 * GROUP, 5 * GROUP + 77] {
            for habit in [Habit::Honest, Habit::Plain] {
                let (dir, content) = (tempfile::tempdir().unwrap(), noise(bytes, 3));
                let fetcher = fetcher(dir.path(), &[memory("a", habit, &content)], PATIENCE);
                fetcher.fetch(&item(&content)).await.unwrap();
                assert_eq!(cached(fetcher.cache(), &item(&content).blob).unwrap(), content, "{bytes} {habit:?}");
                assert!(fetcher.bytes() <= content.len() as u64 + 32 * 6, "{bytes} {habit:?}");
                let kept = std::fs::read_dir(dir.path().join("blobs")).unwrap().count();
                assert_eq!(kept, 1, "neither part nor tree is left");
            }
        }
    });
}

#[test]
fn a_download_that_is_interrupted_50_times_goes_on_and_reads_little_twice_also_if_one_of_three_sources_lies() {
    run(async {
        let (dir, content) = (tempfile::tempdir().unwrap(), noise(120 * GROUP / 2 + 5, 9));
        let item = item(&content);
        let (mut random, mut read, mut lies) = (17u32, 0, 0);
        for round in 0..50 {
            let honest = ["a", "b"].map(|name| memory(name, Habit::Honest, &content));
            for source in &honest {
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                // At a random point, often within groups that are being read.
                source.stop_after.store((random >> 16) as usize % 2, Ordering::SeqCst);
            }
            let liar = memory("liar", Habit::Corrupts, &content);
            let sources = [liar.clone(), honest[0].clone(), honest[1].clone()];
            let fetcher = fetcher(dir.path(), &sources, PATIENCE);
            let fetch = fetcher.fetch(&item);
            let stopped = async {
                while !honest.iter().all(|source| source.stopped.load(Ordering::SeqCst)) {
                    tokio::task::yield_now().await;
                }
            };
            tokio::select! {
                done = fetch => panic!("round {round}: {done:?}"),
                () = stopped => {}
            }
            read += fetcher.bytes();
            lies += liar.reads.load(Ordering::SeqCst);
            // What a crash may leave behind: rubbish in the middle of the part.
            let part = dir.path().join("blobs").join(item.blob.hash.to_string()).with_extension("part");
            if round % 10 == 9 && std::fs::metadata(&part).is_ok_and(|part| part.len() > 100) {
                use std::os::unix::fs::FileExt;
                std::fs::OpenOptions::new().write(true).open(&part).unwrap().write_all_at(&[1, 2, 3], 50).unwrap();
            }
        }
        let fetcher = fetcher(dir.path(), &[memory("a", Habit::Honest, &content)], PATIENCE);
        fetcher.fetch(&item).await.unwrap();
        assert_eq!(cached(fetcher.cache(), &item.blob).unwrap(), content);
        read += fetcher.bytes();
        println!("{read} bytes read for {}, {lies} groups from the liar", content.len());
        // After a restart the liar is not known any more, and is asked for as many groups as it takes at a time.
        assert!(lies <= 50 * 2, "{lies}");
        // Five groups were spoilt; one more may be lost where a write was cut off.
        let most = content.len() as u64 + (12 + lies as u64) * GROUP_BYTES;
        assert!(read <= most, "{read} of {} bytes", content.len());
    });
}

#[test]
fn one_of_three_sources_that_lies_is_found_out_and_its_bytes_are_not_used() {
    run(async {
        for liar in [Habit::Corrupts, Habit::LiesOfTheTree, Habit::Fails] {
            let (dir, content) = (tempfile::tempdir().unwrap(), noise(24 * GROUP, 5));
            let (first, second) = (memory("a", Habit::Honest, &content), memory("b", Habit::Honest, &content));
            let wrong = memory("liar", liar, &content);
            let fetcher = fetcher(dir.path(), &[wrong.clone(), first, second], PATIENCE);
            fetcher.fetch(&item(&content)).await.unwrap();
            assert_eq!(cached(fetcher.cache(), &item(&content).blob).unwrap(), content, "{liar:?}");
            assert!(wrong.reads.load(Ordering::SeqCst) <= 2, "{liar:?} is not asked again");
            // At most the two groups that it was asked for at once.
            assert!(fetcher.bytes() <= content.len() as u64 * 110 / 100, "{liar:?}: {}", fetcher.bytes());
        }
    });
}

#[test]
fn a_source_that_hangs_costs_a_moment_and_no_more() {
    run(async {
        let (dir, content) = (tempfile::tempdir().unwrap(), noise(12 * GROUP, 5));
        let sources = [memory("slow", Habit::Hangs, &content), memory("a", Habit::Honest, &content)];
        let fetcher = fetcher(dir.path(), &sources, PATIENCE);
        let began = std::time::Instant::now();
        fetcher.fetch(&item(&content)).await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
        assert_eq!(cached(fetcher.cache(), &item(&content).blob).unwrap(), content);
    });
}

#[test]
fn a_plain_source_that_lies_is_replaced_by_another() {
    run(async {
        let (dir, content) = (tempfile::tempdir().unwrap(), noise(3 * GROUP, 6));
        let sources = [memory("liar", Habit::PlainCorrupts, &content), memory("a", Habit::Plain, &content)];
        let fetcher = fetcher(dir.path(), &sources, PATIENCE);
        fetcher.fetch(&item(&content)).await.unwrap();
        assert_eq!(cached(fetcher.cache(), &item(&content).blob).unwrap(), content);
    });
}

#[test]
fn when_nobody_gives_the_right_bytes_the_error_says_who_said_what() {
    run(async {
        let (dir, content) = (tempfile::tempdir().unwrap(), noise(2 * GROUP, 6));
        let sources = [memory("liar", Habit::Corrupts, &content), memory("broken", Habit::Fails, &content)];
        let fetcher = fetcher(dir.path(), &sources, Duration::from_millis(600));
        let error = fetcher.fetch(&item(&content)).await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, FetchError::NoSource { .. }), "{text}");
        assert!(text.contains("tensor `weights`") && text.contains("liar: what it gave"), "{text}");
        assert!(text.contains("broken: out of order"), "{text}");
        assert!(cached(fetcher.cache(), &item(&content).blob).is_none());
    });
}

//! Many blobs at a time.

use std::collections::HashMap;

use super::*;

/// Gives many blobs, each read after a moment; or none.
#[derive(Debug)]
pub(crate) struct Library {
    name: &'static str,
    contents: HashMap<BlobHash, Bytes>,
    hangs: bool,
    reads: AtomicUsize,
    /// Reads in progress, now and at most.
    now: AtomicUsize,
    most: AtomicUsize,
}

impl Library {
    pub(crate) fn of(name: &'static str, contents: &[Bytes], hangs: bool) -> Arc<Self> {
        let contents = contents.iter().map(|content| (BlobHash::of(content), content.clone())).collect();
        let [reads, now, most] = [0; 3].map(AtomicUsize::new);
        Arc::new(Self { name, contents, hangs, reads, now, most })
    }
}

impl Source for Library {
    fn name(&self) -> String {
        self.name.to_owned()
    }

    fn parallel(&self) -> usize {
        2
    }

    fn read<'a>(&'a self, item: &'a Item, range: Range<u64>) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        async move {
            self.reads.fetch_add(1, Ordering::SeqCst);
            if self.hangs {
                return std::future::pending().await;
            }
            let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
            self.most.fetch_max(now, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(20)).await;
            self.now.fetch_sub(1, Ordering::SeqCst);
            let content = self.contents.get(&item.blob.hash).ok_or(SourceError::NotHere)?;
            Ok(content.slice(range.start as usize..range.end as usize))
        }
        .boxed()
    }

    fn tree<'a>(&'a self, item: &'a Item) -> BoxFuture<'a, Result<Option<Bytes>, SourceError>> {
        async move {
            if self.hangs {
                return std::future::pending().await;
            }
            let mut builder = TreeBuilder::new();
            builder.update(self.contents.get(&item.blob.hash).ok_or(SourceError::NotHere)?);
            Ok(Some(Bytes::copy_from_slice(builder.finish().list())))
        }
        .boxed()
    }
}

#[test]
fn many_blobs_come_several_at_a_time_and_a_source_that_hangs_does_not_hold_them_up() {
    run(async {
        for bytes in [50_000, GROUP + 50_000] {
            let contents: Vec<Bytes> = (0..40).map(|seed| noise(bytes, seed)).collect();
            let items: Vec<Item> = contents.iter().map(item).collect();
            let dir = tempfile::tempdir().unwrap();
            let (hangs, honest) = (Library::of("hangs", &contents, true), Library::of("honest", &contents, false));
            let sources: Vec<Arc<dyn Source>> = vec![hangs.clone(), honest.clone()];
            let fetcher = Fetcher::new(Cache::new(dir.path(), u64::MAX).unwrap(), sources, None, PATIENCE);
            let began = std::time::Instant::now();
            let pins = fetcher.fetch_all(&items, &|_, _| ()).await.unwrap();
            let (took, most) = (began.elapsed(), honest.most.load(Ordering::SeqCst));
            println!("{} blobs of {bytes} bytes in {took:?}, up to {most} reads at a time", pins.len());
            assert!((4..=16).contains(&most), "{most} reads at a time");
            // Two times, at the beginning, until it is known; one after another they would wait 40 times.
            assert!(took < Duration::from_secs(10), "{took:?}");
            assert!(hangs.reads.load(Ordering::SeqCst) <= 24, "the one that hangs is left alone");
            assert_eq!(fetcher.bytes_by_source().len(), 1);
            assert_eq!(fetcher.bytes_by_source()[0], ("honest".to_owned(), fetcher.bytes()));
        }
    });
}

#[test]
fn a_blob_that_nobody_has_is_given_up_though_others_still_come() {
    run(async {
        let (dir, content) = (tempfile::tempdir().unwrap(), noise(1000, 1));
        let library = Library::of("library", std::slice::from_ref(&content), false) as Arc<dyn Source>;
        let cache = Cache::new(dir.path(), u64::MAX).unwrap();
        let fetcher = Fetcher::new(cache, vec![library], None, Duration::from_millis(300));
        let others = async {
            loop {
                fetcher.fetch(&item(&content)).await.unwrap();
                fetcher.cache().remove(item(&content).blob.hash);
            }
        };
        let nowhere = item(&noise(1000, 2));
        tokio::select! {
            () = others => {}
            outcome = fetcher.fetch(&nowhere) => assert!(matches!(outcome, Err(FetchError::NoSource { .. }))),
        }
    });
}

#[test]
fn many_blobs_that_nobody_has_are_waited_for_once() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let fetcher = Fetcher::new(Cache::new(dir.path(), u64::MAX).unwrap(), Vec::new(), None, Duration::from_secs(1));
        let began = std::time::Instant::now();
        for seed in 0..40 {
            let outcome = fetcher.fetch(&item(&noise(1000, seed))).await;
            assert!(matches!(outcome, Err(FetchError::NoSource { .. })), "{outcome:?}");
        }
        // Each for itself they would take 40 seconds.
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    });
}

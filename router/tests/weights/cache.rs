//! The cache: shared, limited, on a full disk.

use hanse_router::weights::CacheError;
use hanse_router::weights::cache::Begin;

use super::many::Library;
use super::*;

#[test]
fn two_that_share_a_cache_read_a_blob_once() {
    run(async {
        let (dir, content) = (tempfile::tempdir().unwrap(), noise(20 * GROUP, 8));
        let sources = [memory("a", Habit::Honest, &content)];
        // Each with locks of its own, as in two processes.
        let (one, other) = (fetcher(dir.path(), &sources, PATIENCE), fetcher(dir.path(), &sources, PATIENCE));
        let item = item(&content);
        let (first, second) = tokio::join!(one.fetch(&item), other.fetch(&item));
        first.unwrap();
        second.unwrap();
        assert!(one.bytes() + other.bytes() <= content.len() as u64 + 32 * 20);
        assert_eq!(cached(one.cache(), &item.blob).unwrap(), content);
    });
}

#[test]
fn the_longest_unused_goes_first_and_what_is_in_use_stays() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let blobs: Vec<Bytes> = (0..4).map(|seed| noise(100_000, seed)).collect();
        let fetch = async |cache: &Cache, content: &Bytes| {
            let source = memory("a", Habit::Honest, content) as Arc<dyn Source>;
            Fetcher::new(cache.clone(), vec![source], None, PATIENCE).fetch(&item(content)).await
        };
        let cache = Cache::new(dir.path(), 250_000).unwrap();
        fetch(&cache, &blobs[0]).await.unwrap();
        fetch(&cache, &blobs[1]).await.unwrap();
        // Somebody else uses the first: it is the older one, but stays.
        let other = Cache::new(dir.path(), 250_000).unwrap();
        let used = other.open(&item(&blobs[0]).blob).unwrap().unwrap();
        fetch(&cache, &blobs[2]).await.unwrap();
        assert!(cache.has(&item(&blobs[0]).blob) && !cache.has(&item(&blobs[1]).blob));
        // With all in use there is no room, and the error says so.
        let also = cache.open(&item(&blobs[2]).blob).unwrap().unwrap();
        let error = fetch(&cache, &blobs[3]).await.unwrap_err();
        let FetchError::Cache(error) = error else { panic!("{error}") };
        assert!(matches!(*error, CacheError::TooSmall { needed_bytes: 100_000, used_bytes: 200_000, .. }), "{error}");
        drop((used, also));
        fetch(&cache, &blobs[3]).await.unwrap();
        assert!(cache.used_bytes().unwrap() <= 250_000);
    });
}

#[test]
fn the_limit_holds_while_many_blobs_are_fetched_at_once() {
    const LIMIT: u64 = 500_000;
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let contents: Vec<Bytes> = (0..60).map(|seed| noise(50_000, seed)).collect();
        let library = Library::of("library", &contents, false) as Arc<dyn Source>;
        let cache = Cache::new(dir.path(), LIMIT).unwrap();
        let fetcher = Fetcher::new(cache.clone(), vec![library], None, PATIENCE);
        let items: Vec<Item> = contents.iter().map(item).collect();
        let fetches = futures::future::try_join_all(items.chunks(8).map(|items| fetcher.fetch_all(items, &|_, _| ())));
        // What one has is free as soon as the others do not hold it.
        let watched = async {
            loop {
                let used = cache.used_bytes().unwrap();
                assert!(used <= LIMIT, "{used} bytes");
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::select! {
            fetched = fetches => assert!(matches!(fetched, Err(FetchError::Cache(_)))),
            () = watched => {}
        }
        // One after another they all come.
        for item in &items {
            fetcher.fetch(item).await.unwrap();
            assert!(cache.used_bytes().unwrap() <= LIMIT);
        }
    });
}

#[test]
fn what_a_dead_process_was_fetching_or_using_is_free() {
    run(async {
        let (dir, content) = (tempfile::tempdir().unwrap(), noise(2 * GROUP, 8));
        let blob = item(&content).blob;
        let cache = Cache::new(dir.path(), u64::MAX).unwrap();
        let Begin::Ours(part) = cache.begin(blob).unwrap() else { panic!("it is new") };
        let other = Cache::new(dir.path(), u64::MAX).unwrap();
        assert!(matches!(other.begin(blob).unwrap(), Begin::Elsewhere));
        part.write(0, &content[..GROUP]).unwrap();
        // Locks end with their holder.
        drop(part);
        assert!(matches!(other.begin(blob).unwrap(), Begin::Ours(_)));
    });
}

/// Runs a command; whether it succeeded.
fn succeeds(program: &str, args: &[&str]) -> bool {
    std::process::Command::new(program).args(args).output().is_ok_and(|output| output.status.success())
}

#[test]
fn a_full_disk_is_a_clear_error_and_what_was_fetched_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let mount = dir.path().to_str().unwrap();
    if !succeeds("mount", &["-t", "tmpfs", "-o", "size=6m", "tmpfs", mount]) {
        println!("skipped: file systems may not be mounted here");
        return;
    }
    let content = noise(10 * GROUP, 4);
    let outcome = run(async {
        let source = memory("a", Habit::Honest, &content);
        let fetcher = fetcher(dir.path(), &[source], PATIENCE);
        let error = fetcher.fetch(&item(&content)).await.unwrap_err();
        let grown = succeeds("mount", &["-o", "remount,size=40m", mount]);
        let again = fetcher.fetch(&item(&content)).await;
        (error, grown, again, fetcher.bytes(), cached(fetcher.cache(), &item(&content).blob))
    });
    succeeds("umount", &[mount]);
    let (error, grown, again, bytes, found) = outcome;
    let FetchError::Cache(error) = error else { panic!("{error}") };
    assert!(matches!(*error, CacheError::DiskFull { .. }), "{error}");
    assert!(error.to_string().contains("the disk is full"), "{error}");
    assert!(grown && again.is_ok());
    assert_eq!(found.unwrap(), content);
    // Four or five groups were there already; those in flight at the end were read twice.
    assert!(bytes <= content.len() as u64 + 4 * GROUP_BYTES, "{bytes}");
}

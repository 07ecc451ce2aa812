//! Identity files.

use std::fs;
use std::path::Path;

use hanse_protocol::{Identity, IdentityError};

fn load(path: &Path) -> Result<Identity, IdentityError> {
    Identity::load_or_create(path)
}

#[test]
fn an_identity_is_made_once_and_kept() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("deep/down/identity.key");
    let made = load(&path).expect("a new one");
    assert_eq!(load(&path).expect("the same").peer_id(), made.peer_id());
    let left: Vec<_> = fs::read_dir(path.parent().expect("a folder")).expect("a folder").collect();
    assert_eq!(left.len(), 1, "nothing else is left behind");
}

#[test]
fn the_file_is_the_encoding_of_libp2p() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("key");
    let made = load(&path).expect("a new one");
    let bytes = fs::read(&path).expect("it is there");
    assert_eq!(bytes, made.keypair().to_protobuf_encoding().expect("an Ed25519 key"));
    assert_eq!(bytes[..4], [0x08, 0x01, 0x12, 0x40]);
    assert_eq!(bytes[36..], made.public_key());
}

#[cfg(unix)]
#[test]
fn a_key_that_others_may_read_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("key");
    load(&path).expect("a new one");
    assert_eq!(fs::metadata(&path).expect("it is there").permissions().mode() & 0o777, 0o600);
    for mode in [0o640, 0o604, 0o620, 0o777] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("our own file");
        let error = load(&path).expect_err("others may use it");
        assert!(matches!(error, IdentityError::Exposed { mode: found, .. } if found == mode), "{error}");
        assert!(error.to_string().contains(&format!("chmod 600 {}", path.display())), "{error}");
    }
}

#[test]
fn a_file_that_is_no_key_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("key");
    load(&path).expect("a new one");
    for content in [&b""[..], &[0; 68], &[0; 5000]] {
        fs::write(&path, content).expect("our own file");
        let error = load(&path).expect_err("no key");
        assert!(matches!(error, IdentityError::NotAKey { .. }), "{error}");
        assert_eq!(fs::read(&path).expect("it is there"), content);
    }
    assert!(matches!(load(folder.path()), Err(IdentityError::NotAKey { .. } | IdentityError::Io { .. })));
}

#[test]
fn processes_that_make_one_at_once_end_with_the_same() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("key");
    let barrier = std::sync::Barrier::new(8);
    let made: Vec<_> = std::thread::scope(|scope| {
        let one = || {
            barrier.wait();
            load(&path).expect("one of them made it").peer_id()
        };
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(one)).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    assert!(made.iter().all(|peer| *peer == made[0]));
    assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 1);
}

#[test]
fn a_known_key_has_the_peer_id_and_the_signature_of_the_specification() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("key");
    load(&path).expect("a new one, with the right mode");
    let public = "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8";
    fs::write(&path, crate::bytes(&format!("08011240 {} {public}", crate::golden::MODEL))).expect("our own file");
    let identity = load(&path).expect("a key");
    assert_eq!(hex::encode(identity.public_key()), public);
    assert_eq!(identity.peer_id().to_string(), "12D3KooWA4Xop1JaT3MHxwYMkCepYsv4iPVopMXwCz5iHYdBfeSB");
    assert_eq!(
        hex::encode(identity.sign("hanse/advert/1", b"hello").to_bytes()),
        "715fa2f2518a7ac11396fcc081b0c23185feb1d49244bd38fd633f336a88b42604445838df8df072963f234530c38d31cc896da6b90a400629171505e681120c"
    );
}

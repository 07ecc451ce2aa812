//! A member's Ed25519 key.

mod file;

use std::fmt;
use std::path::{Path, PathBuf};

use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use libp2p::PeerId;
use libp2p::identity::Keypair;

/// The key that proves who a member is, on both planes and under its adverts.
///
/// Cheap enough to clone. `Debug` shows the peer id only.
#[derive(Clone)]
pub struct Identity {
    keypair: Keypair,
    signing: SigningKey,
}

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// The file or its folder cannot be read or written.
    #[error("cannot {action} the identity file {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// Others may read the key, so it may no longer be secret.
    #[error("the identity file {} can be read by others (mode {mode:03o}); run: chmod 600 {}", path.display(), path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file is no regular file, or its content is no Ed25519 key.
    #[error("the identity file {} holds no Ed25519 key: {reason}; move it away to have a new identity made", path.display())]
    NotAKey {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

impl Identity {
    /// A new random identity, kept nowhere.
    pub fn generate() -> Self {
        Self::from_secret(&random_secret())
    }

    /// The identity with a given secret, for instance one drawn from a simulation's seed. A secret must be as random as it is to be
    /// kept.
    pub fn from_secret(secret: &[u8; 32]) -> Self {
        Self::from_signing_key(SigningKey::from_bytes(secret))
    }

    /// The identity in the file `path`, made anew if there is no such file.
    ///
    /// The file is libp2p's protobuf encoding of a private key, 68 bytes: `08 01 12 40`, the 32 secret bytes, the 32 public
    /// bytes. It is created with mode 0600, folders above it included where missing, and appears complete or not at all: of two
    /// processes that create it at once, both end with the same key.
    ///
    /// # Errors
    /// [`IdentityError::Exposed`] if group or others have any right to the file; the other variants as they say.
    pub fn load_or_create(path: &Path) -> Result<Self, IdentityError> {
        file::load_or_create(path)
    }

    /// The peer id that derives from the public key.
    pub fn peer_id(&self) -> PeerId {
        self.keypair.public().to_peer_id()
    }

    /// The key in libp2p's form.
    pub fn keypair(&self) -> &Keypair {
        &self.keypair
    }

    /// The public key, 32 bytes.
    pub fn public_key(&self) -> [u8; 32] {
        self.signing.verifying_key().to_bytes()
    }

    /// Signs `message` for one purpose: `domain`, such as `hanse/advert/1`, must contain no zero byte.
    ///
    /// Signed are the domain, a zero byte and the message, so that a signature for one purpose is worth nothing for another.
    /// [`verify_signature`] checks it.
    pub fn sign(&self, domain: &str, message: &[u8]) -> Signature {
        self.signing.sign(&signed_bytes(domain, message))
    }

    fn from_signing_key(signing: SigningKey) -> Self {
        let mut secret = signing.to_bytes();
        let keypair = Keypair::ed25519_from_bytes(&mut secret).expect("32 bytes are an Ed25519 secret key");
        Self { keypair, signing }
    }

    fn from_protobuf(bytes: &[u8]) -> Result<Self, String> {
        let keypair = Keypair::from_protobuf_encoding(bytes).map_err(|error| error.to_string())?;
        let ed25519 = keypair.clone().try_into_ed25519().map_err(|error| error.to_string())?;
        let signing = SigningKey::from_keypair_bytes(&ed25519.to_bytes()).map_err(|error| error.to_string())?;
        Ok(Self { keypair, signing })
    }

    fn to_protobuf(&self) -> [u8; file::FILE_BYTES] {
        let mut bytes = [0; file::FILE_BYTES];
        bytes[..4].copy_from_slice(&[0x08, 0x01, 0x12, 0x40]);
        bytes[4..].copy_from_slice(&self.signing.to_keypair_bytes());
        bytes
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Identity").field(&self.peer_id()).finish()
    }
}

/// Whether `signature` is the one that the owner of `public_key` made over `message` for the purpose `domain`.
///
/// Strict: keys of small order and signatures in any but the one canonical form are refused.
pub fn verify_signature(public_key: &[u8; 32], domain: &str, message: &[u8], signature: &[u8; 64]) -> bool {
    VerifyingKey::from_bytes(public_key)
        .is_ok_and(|key| key.verify_strict(&signed_bytes(domain, message), &Signature::from_bytes(signature)).is_ok())
}

fn signed_bytes(domain: &str, message: &[u8]) -> Vec<u8> {
    [domain.as_bytes(), &[0], message].concat()
}

fn random_secret() -> [u8; 32] {
    // libp2p draws from the system's generator; one source of randomness is enough.
    *<&[u8; 32]>::try_from(libp2p::identity::ed25519::SecretKey::generate().as_ref()).expect("a secret key is 32 bytes")
}

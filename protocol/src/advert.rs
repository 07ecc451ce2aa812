//! Adverts: a member's signed statement of what it hosts and where it is reached.

mod draining;
mod encoding;
mod hosted;
mod popularity;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use libp2p::identity::{PublicKey, ed25519};
use libp2p::{Multiaddr, PeerId};

use crate::discovery::Reachability;
use crate::relayed::is_circuit;
use crate::{Identity, ModelId, Precision, WireDtype, verify_signature};

pub use draining::Draining;
pub use hosted::{HostedError, HostedExperts, MAX_EXPERTS, MAX_LAYERS};
pub use popularity::{MAX_POPULARITY, popularity, rows_per_minute};

/// What signatures under adverts are for.
const DOMAIN: &str = "hanse/advert/1";
/// Public key and signature, before the advert itself.
const SIGNED_PREFIX: usize = 32 + 64;

/// Bytes of an encoded [`SignedAdvert`]: enough for every expert of every layer, and then some.
pub const MAX_ADVERT_BYTES: usize = 576 << 10;
/// Data-plane addresses in an advert.
pub const MAX_DATA_ADDRESSES: usize = 16;
/// Circuit addresses in an advert.
pub const MAX_CIRCUITS: usize = 4;
/// Bytes of one circuit address.
pub const MAX_CIRCUIT_BYTES: usize = 255;
/// How far ahead an advert may expire. Adverts are refreshed every few minutes; one that claims days is not believed.
pub const MAX_ADVERT_LIFETIME: Duration = Duration::from_secs(60 * 60);

/// How long an advert counts whose times cannot be right, because a clock is wrong.
pub const ASSUMED_LIFETIME: Duration = Duration::from_secs(2 * 60);

/// What a member hosts, where, and how busy it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advert {
    /// The model whose experts it hosts.
    pub model: ModelId,
    /// Which experts of which layers.
    pub hosted: HostedExperts,
    /// How many experts each MoE layer of the model has, hosted or not: coverage can be told without the model's files.
    /// Every hosted expert is one of them.
    pub layers: BTreeMap<u32, u32>,
    /// Formats it understands, best first; one to three, distinct.
    pub wire_dtypes: Vec<WireDtype>,
    /// Where its data plane listens (UDP); at most [`MAX_DATA_ADDRESSES`], none of them unspecified or with port 0.
    pub data_addresses: Vec<SocketAddr>,
    /// Rows it is willing to have waiting at a time.
    pub capacity_rows: u32,
    /// How full it is, 0 to 1000.
    pub load_permille: u16,
    /// Why nothing new is to be sent to it, if that is so.
    pub draining: Option<Draining>,
    /// Rises with every advert of this member: of two, the one with the higher number counts.
    pub sequence: u64,
    /// When it ends to be true, in milliseconds since 1970.
    pub expires_unix_ms: u64,
    /// How wanted each hosted expert is here, see [`popularity`]: one step per hosted expert in ascending order, or none at all.
    pub popularity: Vec<u8>,
    /// Experts that it is about to host: others count them when they choose what to host, but do not call them.
    pub loading: HostedExperts,
    /// How it is reached.
    pub reachability: Reachability,
    /// Where it is reached through relays: circuit addresses, at most [`MAX_CIRCUITS`] of at most [`MAX_CIRCUIT_BYTES`] each.
    pub circuits: Vec<Multiaddr>,
    /// How it stores the experts: the least of them, where they differ.
    pub precision: Precision,
    /// The published model whose experts these are in fewer bits, if `model` is a quantised one: clients of that model may accept them.
    pub variant_of: Option<ModelId>,
}

impl Advert {
    /// Whether it hosts experts of `model`, as published or as a variant in fewer bits.
    #[must_use]
    pub fn serves(&self, model: ModelId) -> bool {
        self.model == model || self.variant_of == Some(model)
    }
}

/// An advert with its author's signature, not yet verified after decoding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedAdvert {
    public_key: [u8; 32],
    signature: [u8; 64],
    advert: Vec<u8>,
}

/// Why an advert cannot be made or is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AdvertError {
    /// Longer than any advert.
    #[error("an advert of {0} bytes, more than the {MAX_ADVERT_BYTES} allowed")]
    TooLong(usize),
    /// It ends too early.
    #[error("the advert ends too early")]
    Truncated,
    /// It goes on after its end.
    #[error("{0} bytes after the end of the advert")]
    TrailingBytes(usize),
    /// The signature is not its author's over these bytes.
    #[error("the advert's signature is wrong")]
    Signature,
    /// Another encoding of adverts.
    #[error("advert format {0} is not known")]
    Format(u16),
    /// It is signed by another member than the one that gave it.
    #[error("the advert is {0}'s")]
    OtherAuthor(PeerId),
    /// It was true until then.
    #[error("the advert expired {0:?} ago")]
    Expired(Duration),
    /// It claims to be true for too long.
    #[error("the advert expires in {0:?}, further ahead than {MAX_ADVERT_LIFETIME:?}")]
    TooFarAhead(Duration),
    /// More addresses than allowed.
    #[error("{0} data addresses, more than the {MAX_DATA_ADDRESSES} allowed")]
    TooManyAddresses(usize),
    /// More circuits than allowed, or one that is none, or is too long.
    #[error("the advert's circuit addresses are not at most {MAX_CIRCUITS} addresses of relays")]
    BadCircuit,
    /// An address nobody can dial.
    #[error("{0} is not an address that can be dialled")]
    BadAddress(SocketAddr),
    /// Layers, experts or their encoding.
    #[error(transparent)]
    Hosted(#[from] HostedError),
    /// It hosts an expert that its model does not have.
    #[error("the advert hosts expert {expert} of layer {layer}, which its model does not have")]
    NotInModel {
        /// The layer.
        layer: u32,
        /// The expert.
        expert: u32,
    },
    /// A field with a value that means nothing.
    #[error("the advert's {0} is out of range")]
    OutOfRange(&'static str),
}

impl SignedAdvert {
    /// Signs `advert` in the name of `identity`.
    ///
    /// # Errors
    /// As [`verify`](Self::verify), save for the times: an advert that others would refuse is not signed.
    pub fn sign(advert: &Advert, identity: &Identity) -> Result<Self, AdvertError> {
        advert.check()?;
        let bytes = encoding::encode(advert);
        check_length(SIGNED_PREFIX + bytes.len())?;
        let signature = identity.sign(DOMAIN, &bytes).to_bytes();
        Ok(Self { public_key: identity.public_key(), signature, advert: bytes })
    }

    /// The advert and the peer id of its author, if everything about it is right at the time `now_unix_ms`.
    ///
    /// The caller compares the peer id with the one it asked or expected.
    ///
    /// # Errors
    /// The first thing that is wrong, as the variants of [`AdvertError`] say. The signature is checked before anything is read.
    pub fn verify(&self, now_unix_ms: u64) -> Result<(PeerId, Advert), AdvertError> {
        let (author, advert) = self.verify_author()?;
        match advert.expires_unix_ms.checked_sub(now_unix_ms) {
            None | Some(0) => Err(AdvertError::Expired(Duration::from_millis(now_unix_ms - advert.expires_unix_ms))),
            Some(ahead) if Duration::from_millis(ahead) > MAX_ADVERT_LIFETIME => {
                Err(AdvertError::TooFarAhead(Duration::from_millis(ahead)))
            }
            Some(_) => Ok((author, advert)),
        }
    }

    /// Verifies an advert that `author` itself gave just now, so that it is fresh whatever the clocks say.
    ///
    /// If the times are wrong, the author's clock or ours is: the advert is then taken to be true for
    /// [`ASSUMED_LIFETIME`] from now, and the second value says what is wrong with the times.
    ///
    /// # Errors
    /// As [`verify`](Self::verify), save for the times, and [`AdvertError::OtherAuthor`].
    pub fn verify_from(&self, author: PeerId, now_unix_ms: u64) -> Result<(Advert, Option<AdvertError>), AdvertError> {
        let (signer, mut advert) = self.verify_author()?;
        if signer != author {
            return Err(AdvertError::OtherAuthor(signer));
        }
        match self.verify(now_unix_ms) {
            Ok(_) => Ok((advert, None)),
            Err(wrong) => {
                let lifetime = u64::try_from(ASSUMED_LIFETIME.as_millis()).unwrap_or(u64::MAX);
                advert.expires_unix_ms = now_unix_ms.saturating_add(lifetime);
                Ok((advert, Some(wrong)))
            }
        }
    }

    fn verify_author(&self) -> Result<(PeerId, Advert), AdvertError> {
        if !verify_signature(&self.public_key, DOMAIN, &self.advert, &self.signature) {
            return Err(AdvertError::Signature);
        }
        let advert = encoding::decode(&self.advert)?;
        advert.check()?;
        Ok((self.peer_id()?, advert))
    }

    /// Public key (32 bytes), signature (64 bytes), advert.
    pub fn encode(&self) -> Vec<u8> {
        [&self.public_key[..], &self.signature, &self.advert].concat()
    }

    /// Splits the bytes into their three parts; [`verify`](Self::verify) then reads the advert.
    ///
    /// # Errors
    /// [`AdvertError::TooLong`] and [`AdvertError::Truncated`].
    pub fn decode(bytes: &[u8]) -> Result<Self, AdvertError> {
        check_length(bytes.len())?;
        let (public_key, rest) = bytes.split_first_chunk().ok_or(AdvertError::Truncated)?;
        let (signature, advert) = rest.split_first_chunk().ok_or(AdvertError::Truncated)?;
        Ok(Self { public_key: *public_key, signature: *signature, advert: advert.to_vec() })
    }

    fn peer_id(&self) -> Result<PeerId, AdvertError> {
        let key = ed25519::PublicKey::try_from_bytes(&self.public_key).map_err(|_| AdvertError::Signature)?;
        Ok(PublicKey::from(key).to_peer_id())
    }
}

impl Advert {
    fn check(&self) -> Result<(), AdvertError> {
        if self.data_addresses.len() > MAX_DATA_ADDRESSES {
            return Err(AdvertError::TooManyAddresses(self.data_addresses.len()));
        }
        if let Some(address) = self.data_addresses.iter().find(|address| !can_be_dialled(address)) {
            return Err(AdvertError::BadAddress(*address));
        }
        let usable = |circuit: &Multiaddr| is_circuit(circuit) && circuit.len() <= MAX_CIRCUIT_BYTES;
        if self.circuits.len() > MAX_CIRCUITS || !self.circuits.iter().all(usable) {
            return Err(AdvertError::BadCircuit);
        }
        let dtypes = &self.wire_dtypes;
        if dtypes.is_empty() || WireDtype::ALL.iter().any(|known| dtypes.iter().filter(|d| *d == known).count() > 1) {
            return Err(AdvertError::OutOfRange("list of wire dtypes"));
        }
        let beyond = |(layer, experts): (&u32, &u32)| *layer >= MAX_LAYERS || !(1..=MAX_EXPERTS).contains(experts);
        if self.layers.iter().any(beyond) {
            return Err(AdvertError::OutOfRange("list of the model's layers"));
        }
        // The highest expert of each layer stands for all: an advert of a stranger may hold four million.
        let known = |(layer, expert): (u32, u32)| self.layers.get(&layer).is_some_and(|experts| expert < *experts);
        if let Some((layer, expert)) = self.hosted.highest().chain(self.loading.highest()).find(|any| !known(*any)) {
            return Err(AdvertError::NotInModel { layer, expert });
        }
        let told = self.popularity.len();
        if (told != 0 && told != self.hosted.count()) || self.popularity.iter().any(|step| *step > MAX_POPULARITY) {
            return Err(AdvertError::OutOfRange("list of popularities"));
        }
        if self.load_permille > 1000 {
            return Err(AdvertError::OutOfRange("load"));
        }
        if self.variant_of == Some(self.model) {
            return Err(AdvertError::OutOfRange("model of which it is a variant"));
        }
        Ok(())
    }
}

fn can_be_dialled(address: &SocketAddr) -> bool {
    let ip = address.ip();
    let broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
    address.port() != 0 && !ip.is_unspecified() && !ip.is_multicast() && !broadcast
}

fn check_length(length: usize) -> Result<(), AdvertError> {
    if length > MAX_ADVERT_BYTES { Err(AdvertError::TooLong(length)) } else { Ok(()) }
}

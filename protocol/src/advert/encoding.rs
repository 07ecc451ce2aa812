//! Adverts as bytes, little-endian and without padding; the table is in `docs/protocol.md`.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use libp2p::Multiaddr;

use super::{
    Advert, AdvertError, Draining, HostedError, HostedExperts, MAX_CIRCUITS, MAX_DATA_ADDRESSES, MAX_LAYERS, popularity,
};
use crate::discovery::Reachability;
use crate::{ModelId, Precision, WireDtype};

const FORMAT: u16 = 2;

pub(super) fn encode(advert: &Advert) -> Vec<u8> {
    let mut out = Vec::with_capacity(256);
    out.extend(FORMAT.to_le_bytes());
    out.extend(advert.model.0);
    put_experts(&mut out, &advert.hosted);
    out.push(advert.wire_dtypes.len() as u8);
    out.extend(advert.wire_dtypes.iter().map(|dtype| dtype.code()));
    out.push(advert.data_addresses.len() as u8);
    for address in &advert.data_addresses {
        match address.ip() {
            IpAddr::V4(ip) => {
                out.push(4);
                out.extend(ip.octets());
            }
            IpAddr::V6(ip) => {
                out.push(6);
                out.extend(ip.octets());
            }
        }
        out.extend(address.port().to_le_bytes());
    }
    out.extend(advert.capacity_rows.to_le_bytes());
    out.extend(advert.load_permille.to_le_bytes());
    out.push(advert.draining.map_or(0, Draining::code));
    out.extend(advert.sequence.to_le_bytes());
    out.extend(advert.expires_unix_ms.to_le_bytes());
    out.extend((advert.layers.len() as u16).to_le_bytes());
    for (layer, experts) in &advert.layers {
        out.extend((*layer as u16).to_le_bytes());
        out.extend((*experts as u16).to_le_bytes());
    }
    out.push((!advert.popularity.is_empty()).into());
    out.extend(popularity::pack(&advert.popularity));
    put_experts(&mut out, &advert.loading);
    out.push(advert.reachability as u8);
    out.push(advert.circuits.len() as u8);
    for circuit in &advert.circuits {
        out.push(circuit.len() as u8);
        out.extend(circuit.as_ref());
    }
    out.push(advert.precision.code());
    out.push(advert.variant_of.is_some().into());
    out.extend(advert.variant_of.iter().flat_map(|model| model.0));
    out
}

fn put_experts(out: &mut Vec<u8>, experts: &HostedExperts) {
    let bitmaps = experts.bitmaps();
    out.extend((bitmaps.len() as u16).to_le_bytes());
    for (layer, bitmap) in bitmaps {
        out.extend((layer as u16).to_le_bytes());
        out.extend((bitmap.len() as u16).to_le_bytes());
        out.extend(bitmap);
    }
}

pub(super) fn decode(bytes: &[u8]) -> Result<Advert, AdvertError> {
    let mut rest = Reader(bytes);
    let format = rest.u16()?;
    if format != FORMAT {
        return Err(AdvertError::Format(format));
    }
    let mut advert = Advert {
        model: ModelId(rest.array()?),
        hosted: experts(&mut rest)?,
        wire_dtypes: wire_dtypes(&mut rest)?,
        data_addresses: data_addresses(&mut rest)?,
        capacity_rows: u32::from_le_bytes(rest.array()?),
        load_permille: rest.u16()?,
        draining: match rest.u8()? {
            0 => None,
            code => Some(Draining::from_code(code).ok_or(AdvertError::OutOfRange("draining"))?),
        },
        sequence: u64::from_le_bytes(rest.array()?),
        expires_unix_ms: u64::from_le_bytes(rest.array()?),
        layers: layers(&mut rest)?,
        popularity: Vec::new(),
        loading: HostedExperts::new(),
        reachability: Reachability::Unreachable,
        circuits: Vec::new(),
        precision: Precision::F32,
        variant_of: None,
    };
    advert.popularity = match rest.u8()? {
        0 => Vec::new(),
        1 if !advert.hosted.is_empty() => {
            let count = advert.hosted.count();
            popularity::unpack(rest.take(count.div_ceil(2))?, count)?
        }
        _ => return Err(AdvertError::OutOfRange("popularity flag")),
    };
    advert.loading = experts(&mut rest)?;
    advert.reachability = match rest.u8()? {
        0 => Reachability::Direct,
        1 => Reachability::Relayed,
        2 => Reachability::Unreachable,
        _ => return Err(AdvertError::OutOfRange("reachability")),
    };
    advert.circuits = circuits(&mut rest)?;
    advert.precision = Precision::from_code(rest.u8()?).ok_or(AdvertError::OutOfRange("precision"))?;
    advert.variant_of = match rest.u8()? {
        0 => None,
        1 => Some(ModelId(rest.array()?)),
        _ => return Err(AdvertError::OutOfRange("variant flag")),
    };
    match rest.0.len() {
        0 => Ok(advert),
        trailing => Err(AdvertError::TrailingBytes(trailing)),
    }
}

fn experts(rest: &mut Reader<'_>) -> Result<HostedExperts, AdvertError> {
    let layers = rest.u16()?;
    if u32::from(layers) > MAX_LAYERS {
        return Err(HostedError::Layer(layers.into()).into());
    }
    let mut hosted = HostedExperts::new();
    for _ in 0..layers {
        let layer = rest.u16()?;
        let length = rest.u16()?;
        hosted.push_bitmap(layer.into(), rest.take(length.into())?)?;
    }
    Ok(hosted)
}

fn layers(rest: &mut Reader<'_>) -> Result<BTreeMap<u32, u32>, AdvertError> {
    let count = rest.u16()?;
    let mut layers = BTreeMap::new();
    for _ in 0..count {
        let (layer, experts) = (rest.u16()?.into(), rest.u16()?.into());
        if layers.last_key_value().is_some_and(|(last, _)| *last >= layer) {
            return Err(HostedError::LayerOrder(layer).into());
        }
        layers.insert(layer, experts);
    }
    Ok(layers)
}

fn wire_dtypes(rest: &mut Reader<'_>) -> Result<Vec<WireDtype>, AdvertError> {
    let count = rest.u8()?;
    if usize::from(count) > WireDtype::ALL.len() {
        return Err(AdvertError::OutOfRange("list of wire dtypes"));
    }
    (0..count).map(|_| WireDtype::from_code(rest.u8()?).ok_or(AdvertError::OutOfRange("wire dtype"))).collect()
}

fn data_addresses(rest: &mut Reader<'_>) -> Result<Vec<SocketAddr>, AdvertError> {
    let count = rest.u8()?;
    if usize::from(count) > MAX_DATA_ADDRESSES {
        return Err(AdvertError::TooManyAddresses(count.into()));
    }
    (0..count)
        .map(|_| {
            let ip = match rest.u8()? {
                4 => IpAddr::from(Ipv4Addr::from(rest.array::<4>()?)),
                6 => IpAddr::from(Ipv6Addr::from(rest.array::<16>()?)),
                _ => return Err(AdvertError::OutOfRange("address family")),
            };
            Ok(SocketAddr::new(ip, rest.u16()?))
        })
        .collect()
}

fn circuits(rest: &mut Reader<'_>) -> Result<Vec<Multiaddr>, AdvertError> {
    let count = rest.u8()?;
    if usize::from(count) > MAX_CIRCUITS {
        return Err(AdvertError::BadCircuit);
    }
    (0..count)
        .map(|_| {
            let length = rest.u8()?;
            Multiaddr::try_from(rest.take(length.into())?.to_vec()).map_err(|_| AdvertError::BadCircuit)
        })
        .collect()
}

/// What is left to be read.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], AdvertError> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(AdvertError::Truncated)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], AdvertError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(AdvertError::Truncated)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn u8(&mut self) -> Result<u8, AdvertError> {
        self.array().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Result<u16, AdvertError> {
        self.array().map(u16::from_le_bytes)
    }
}

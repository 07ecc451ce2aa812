//! What peers say to each other: identity, adverts, frames, discovery and the data plane.

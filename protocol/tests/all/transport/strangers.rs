//! Those who speak the same TLS, and those who do not.

use super::*;

/// A stranger who uses libp2p's own TLS configuration and quinn's defaults, and one of our endpoints that it has dialled.
pub(super) struct Stranger {
    id: PeerId,
    pub(super) dialled: Result<quinn::Connection, quinn::ConnectionError>,
    pub(super) accepted: Result<DataConnection, EstablishError>,
    // Kept, since a dropped endpoint stops its connections.
    _endpoints: (quinn::Endpoint, DataEndpoint),
}

pub(super) async fn stranger(change: impl FnOnce(&mut rustls::ClientConfig)) -> Stranger {
    let far_identity = Identity::generate();
    let far = DataEndpoint::bind(&far_identity, "127.0.0.1:0".parse().expect("v4")).expect("a free port");
    let identity = Identity::generate();
    let mut tls =
        libp2p_tls::make_client_config(identity.keypair(), Some(far_identity.peer_id())).expect("a certificate");
    tls.alpn_protocols = vec![ALPN.to_vec()];
    change(&mut tls);
    let config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).expect("TLS 1.3")));
    let near = quinn::Endpoint::client("127.0.0.1:0".parse().expect("v4")).expect("a free port");
    let dialling = near.connect_with(config, far.local_addr().expect("it is bound"), "l").expect("an address");
    let accept = async { far.accept().await.expect("open").establish(PATIENCE).await };
    let (dialled, accepted) = tokio::join!(dialling, accept);
    Stranger { id: identity.peer_id(), dialled, accepted, _endpoints: (near, far) }
}

#[tokio::test]
async fn libp2ps_own_tls_configuration_can_dial_us() {
    let stranger = stranger(|_| ()).await;
    assert!(stranger.dialled.is_ok());
    assert_eq!(stranger.accepted.expect("a handshake").peer_id(), stranger.id);
}

#[tokio::test]
async fn we_can_dial_libp2ps_own_tls_configuration() {
    let identity = Identity::generate();
    let mut tls = libp2p_tls::make_server_config(identity.keypair()).expect("a certificate");
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let config = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls).expect("TLS 1.3")));
    let far = quinn::Endpoint::server(config, "127.0.0.1:0".parse().expect("v4")).expect("a free port");
    let near_identity = Identity::generate();
    let near = DataEndpoint::bind(&near_identity, "127.0.0.1:0".parse().expect("v4")).expect("a free port");
    let address = far.local_addr().expect("it is bound");
    let accept = async { far.accept().await.expect("open").await.expect("a handshake") };
    let (dialled, accepted) = tokio::join!(near.connect(identity.peer_id(), address, PATIENCE), accept);
    assert_eq!(dialled.expect("a handshake").peer_id(), identity.peer_id());
    let certificates = accepted.peer_identity().expect("a certificate");
    let certificates = certificates.downcast::<Vec<rustls::pki_types::CertificateDer<'static>>>().expect("rustls");
    let certificate = libp2p_tls::certificate::parse(&certificates[0]).expect("one of libp2p");
    assert_eq!(certificate.peer_id(), near_identity.peer_id());
}

#[tokio::test]
async fn another_application_protocol_is_refused() {
    let stranger = stranger(|tls| tls.alpn_protocols = vec![b"libp2p".to_vec()]).await;
    assert!(stranger.dialled.is_err() && stranger.accepted.is_err());
}

#[derive(Debug)]
struct NoCertificate;

impl rustls::client::ResolvesClientCert for NoCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

#[tokio::test]
async fn a_client_that_does_not_prove_who_it_is_is_refused() {
    let stranger = stranger(|tls| tls.client_auth_cert_resolver = Arc::new(NoCertificate)).await;
    let error = stranger.accepted.expect_err("nobody in particular");
    assert!(matches!(error, EstablishError::Handshake { .. }), "{error}");
}

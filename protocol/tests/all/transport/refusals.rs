//! Frames that are cut short or break a rule.

use super::strangers::stranger;
use super::*;

/// Sends raw bytes on a stream of its own and reads the one frame that comes back.
async fn send_raw(connection: &quinn::Connection, bytes: &[u8], finish: bool) -> Result<Frame, FrameError> {
    let (mut send, mut recv) = connection.open_bi().await.expect("a stream");
    // It may be stopped in the middle, which is what some tests are about.
    let _ = send.write_all(bytes).await;
    if finish {
        let _ = send.finish();
    }
    let frame = read_frame(&mut recv, &FrameLimits::default()).await;
    assert!(frame.is_err() || matches!(read_frame(&mut recv, &FrameLimits::default()).await, Err(FrameError::Closed)));
    frame
}

fn refusal_code(frame: Result<Frame, FrameError>) -> RefusalCode {
    match frame {
        Ok(Frame::Refusal(refusal)) => refusal.code,
        other => panic!("no refusal: {other:?}"),
    }
}

#[tokio::test]
async fn bad_frames_are_refused_and_disturb_no_other_stream() {
    let stranger = stranger(|_| ()).await;
    let connection = stranger.dialled.expect("a handshake");
    tokio::spawn(echo(stranger.accepted.expect("a handshake")));
    let good = to_bytes(&numbered(5)).await;
    let mut other_version = good.clone();
    other_version[4] = 2;
    let mut oversized = good.clone();
    oversized[12..16].fill(0xff);
    oversized.resize(8 << 20, 0);
    let cases: [(&[u8], bool, RefusalCode); 5] = [
        (b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n", true, RefusalCode::Malformed),
        (&other_version, false, RefusalCode::UnsupportedVersion),
        (&oversized, false, RefusalCode::TooLarge),
        (&good[..good.len() - 1], true, RefusalCode::Malformed),
        (&[0; 4096], false, RefusalCode::Malformed),
    ];
    // A stream that is in use all the while.
    let (mut send, mut recv) = connection.open_bi().await.expect("a stream");
    for (bytes, finish, code) in cases {
        assert_eq!(refusal_code(send_raw(&connection, bytes, finish).await), code);
        send.write_all(&good).await.expect("the stream lives");
        assert_answers(read_frame(&mut recv, &FrameLimits::default()).await.expect("an answer"), 5);
    }
}

async fn to_bytes(frame: &Frame) -> Vec<u8> {
    let mut bytes = Vec::new();
    hanse_protocol::write_frame(&mut bytes, frame).await.expect("a proper frame");
    bytes
}

#[tokio::test]
async fn a_refusal_that_ends_the_stream_does_not_end_the_connection() {
    let pair = pair().await;
    let server = pair.server.clone();
    tokio::spawn(async move {
        // This server takes calls of one row only.
        let limits = FrameLimits { max_rows: 1, ..FrameLimits::default() };
        while let Some(mut stream) = server.accept_stream().await {
            while let Ok(answer) = match stream.read(&limits).await {
                Ok(Frame::Call(call)) => Ok(answer_to(call)),
                Ok(_) => Err(()),
                Err(error) => error.refusal().map(Frame::Refusal).ok_or(()),
            } {
                if stream.write(&answer).await.is_err() {
                    break;
                }
            }
        }
    });
    let answer = pair.client.call(&numbered(1), PATIENCE).await;
    assert!(matches!(answer, Ok(Frame::Refusal(refusal)) if refusal.code == RefusalCode::TooLarge));
    let body = vec![0; 4].into();
    let assignments = vec![hanse_protocol::ExpertRows { expert: 0, rows: vec![0], weights: vec![1.0] }];
    let small = Frame::Call(ExpertCall { rows: 1, assignments, body, ..call() });
    assert!(matches!(pair.client.call(&small, PATIENCE).await, Ok(Frame::Answer(_))));
}

#[tokio::test]
async fn a_sender_in_the_middle_of_a_refused_frame_is_stopped_and_reads_the_refusal() {
    let pair = pair().await;
    let server = pair.server.clone();
    let (done, is_done) = tokio::sync::oneshot::channel::<()>();
    let serving = tokio::spawn(async move {
        let limits = FrameLimits { max_body_bytes: 1 << 20, ..FrameLimits::default() };
        let mut stream = server.accept_stream().await.expect("a stream");
        let error = stream.read(&limits).await.expect_err("more than 1 MiB");
        stream.write(&Frame::Refusal(error.refusal().expect("it can be refused"))).await.expect("the client reads");
        assert!(matches!(stream.read(&limits).await, Err(FrameError::Poisoned)));
        // The stream is kept, so that it is the refusal that stops the client and not the end of the stream.
        is_done.await.expect("the client has its answer");
    });
    // Larger than the window of a stream: the client cannot have written it all.
    let (rows, hidden_size) = (1024, 8192);
    let big = ExpertCall { rows, hidden_size, body: vec![0; 16 << 20].into(), ..call() };
    let answer = pair.client.call(&Frame::Call(big), PATIENCE).await.expect("a refusal");
    assert!(matches!(answer, Frame::Refusal(refusal) if refusal.code == RefusalCode::TooLarge));
    done.send(()).expect("the server waits");
    serving.await.expect("no panic");
}

#[tokio::test]
async fn an_answer_given_up_half_way_is_not_taken_for_a_whole_one() {
    let stranger = stranger(|_| ()).await;
    let (connection, server) = (stranger.dialled.expect("a handshake"), stranger.accepted.expect("a handshake"));
    let (mut send, mut recv) = connection.open_bi().await.expect("a stream");
    send.write_all(&to_bytes(&numbered(1)).await).await.expect("the stream lives");
    let mut stream = server.accept_stream().await.expect("a stream");
    stream.read(&FrameLimits::default()).await.expect("a call");
    // Larger than any window, and the client does not read: it cannot be written to its end.
    let (rows, hidden_size) = (2048, 8192);
    let big = answer_to(ExpertCall { rows, hidden_size, body: vec![0; 32 << 20].into(), ..call() });
    assert!(tokio::time::timeout(SOON, stream.write(&big)).await.is_err());
    assert!(matches!(stream.write(&big).await, Err(FrameError::Poisoned)));
    drop(stream);
    let error = read_frame(&mut recv, &FrameLimits::default()).await.expect_err("half a frame");
    assert!(matches!(error, FrameError::Reset), "{error}");
}

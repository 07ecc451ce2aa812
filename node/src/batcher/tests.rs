//! Turns, bounds, and the same bits whatever the passes.

use std::path::Path;

use futures::FutureExt;
use hanse_model::{Checkpoint, ExpertJob, add_weighted, compute_pool, run_experts};
use hanse_protocol::Identity;

use super::*;
use crate::store::ExpertStore;

const FAR: Duration = Duration::from_secs(600);

fn client() -> PeerId {
    Identity::generate().peer_id()
}

/// Work of so many rows for one expert that nobody computes.
fn rows(client: PeerId, rows: u32) -> Work {
    Work {
        client,
        layer: 0,
        experts: ExpertStore::new(1).snapshot(),
        hidden_size: 1,
        hidden: vec![0.0; rows as usize],
        assignments: vec![ExpertRows { expert: 0, rows: (0..rows).collect(), weights: vec![1.0; rows as usize] }],
        combine: Combine::Peer,
        deadline: Instant::now() + FAR,
        cancel: CancellationToken::new(),
    }
}

fn push(queue: &mut Queue, work: Work) -> Result<(), WorkError> {
    queue.push(Request::new(work).0, 4000)
}

/// Pairs of each client in the next pass.
fn pass(queue: &mut Queue, clients: &[PeerId]) -> Vec<usize> {
    let slices = queue.take(Instant::now());
    let of = |client: &PeerId| slices.iter().filter(|s| s.0.work.client == *client).map(|s| s.1.len()).sum();
    clients.iter().map(of).collect()
}

#[test]
fn clients_share_a_pass_equally_and_what_some_leave_free_goes_to_the_others() {
    let clients = [client(), client(), client()];
    let mut queue = Queue::default();
    push(&mut queue, rows(clients[0], 3000)).unwrap();
    push(&mut queue, rows(clients[1], 100)).unwrap();
    push(&mut queue, rows(clients[2], 600)).unwrap();
    assert_eq!(pass(&mut queue, &clients), [462, 100, 462]);
    assert_eq!(queue.pairs(), 2676);
    // The first goes on where it was, and has the rest for itself.
    assert_eq!(pass(&mut queue, &clients), [886, 0, 138]);
    assert_eq!(pass(&mut queue, &clients), [1024, 0, 0]);
    assert_eq!(pass(&mut queue, &clients), [628, 0, 0]);
    assert!(queue.is_empty() && queue.pairs() == 0);
}

#[test]
fn more_clients_than_a_pass_has_room_for_take_turns() {
    let clients: Vec<PeerId> = (0..1100).map(|_| client()).collect();
    let mut queue = Queue::default();
    for &client in &clients {
        push(&mut queue, rows(client, 2)).unwrap();
    }
    let first = pass(&mut queue, &clients);
    assert!(first[..1024].iter().all(|&pairs| pairs == 1) && first[1024..].iter().all(|&pairs| pairs == 0));
    let second = pass(&mut queue, &clients);
    assert!(second[1024..].iter().all(|&pairs| pairs == 1), "who found no room comes first");
}

#[test]
fn one_who_fills_the_queue_keeps_nobody_out_and_memory_is_bounded() {
    let (greedy, modest) = (client(), client());
    let mut queue = Queue::default();
    for _ in 0..4 {
        push(&mut queue, rows(greedy, 1000)).unwrap();
    }
    assert_eq!(push(&mut queue, rows(greedy, 1)), Err(WorkError::Full));
    assert_eq!(push(&mut queue, rows(modest, 2001)), Err(WorkError::Full), "more than half");
    push(&mut queue, rows(modest, 2000)).unwrap();
    assert_eq!(push(&mut queue, rows(modest, 1)), Err(WorkError::Full));
    let mut others = 0;
    while push(&mut queue, rows(client(), 100)).is_ok() {
        others += 1;
    }
    assert!(others > 10, "{others}");
    assert!(queue.pairs() <= 8000, "{}", queue.pairs());
}

#[test]
fn an_empty_queue_takes_a_request_of_any_size() {
    let mut queue = Queue::default();
    push(&mut queue, rows(client(), 100_000)).unwrap();
    assert_eq!(push(&mut queue, rows(client(), 1)), Err(WorkError::Full));
}

#[test]
fn work_that_nobody_waits_for_is_dropped_even_half_done() {
    let clients = [client(), client()];
    let mut queue = Queue::default();
    let (cancelled, mut late) = (rows(clients[0], 2000), rows(clients[1], 10));
    let cancel = cancelled.cancel.clone();
    late.deadline = Instant::now();
    let (late, mut answer) = Request::new(late);
    push(&mut queue, cancelled).unwrap();
    assert_eq!(pass(&mut queue, &clients), [1024, 0]);
    cancel.cancel();
    queue.push(late, 4000).unwrap();
    assert_eq!(pass(&mut queue, &clients), [0, 0]);
    assert!(queue.is_empty() && queue.pairs() == 0);
    assert_eq!(answer.try_recv().unwrap().unwrap_err(), WorkError::DeadlinePassed);
}

fn bundled() -> (Checkpoint, usize) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/models/tiny-moe");
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let width = checkpoint.spec().hidden_size;
    (checkpoint, width)
}

/// Work of `rows` rows, all for experts 0, 1 and 2 of layer 0.
fn real(checkpoint: &Checkpoint, rows: u32, combine: Combine) -> Work {
    let store = ExpertStore::load(checkpoint, &[(0, 0), (0, 1), (0, 2)], |_| ()).unwrap();
    let width = checkpoint.spec().hidden_size;
    let hidden = (0..rows as usize * width).map(|i| (i * 31 % 97) as f32 / 50.0 - 1.0).collect();
    let assigned = |expert| ExpertRows {
        expert,
        rows: (0..rows).collect(),
        weights: (0..rows).map(|row| 0.1 + (row % 7) as f32 * 0.3 + expert as f32).collect(),
    };
    Work {
        client: client(),
        layer: 0,
        experts: store.snapshot(),
        hidden_size: width,
        hidden,
        assignments: (0..3).map(assigned).collect(),
        combine,
        deadline: Instant::now() + FAR,
        cancel: CancellationToken::new(),
    }
}

#[tokio::test]
async fn any_number_of_passes_gives_the_bits_of_one_expert_after_another() {
    let (checkpoint, width) = bundled();
    let pool = Arc::new(compute_pool(2).unwrap());
    let batcher = Batcher::start(pool.clone(), 100).unwrap();
    // One in the caller's task, one in a pass of the thread, one in four.
    for rows in [1, 100, 1200] {
        for combine in [Combine::Client, Combine::Peer] {
            let work = real(&checkpoint, rows, combine);
            let mut outputs = vec![vec![0.0; work.hidden.len()]; 3];
            for (expert, output) in outputs.iter_mut().enumerate() {
                let expert = work.experts.expert(0, expert as u32).unwrap();
                run_experts(&mut [ExpertJob { expert, hidden: &work.hidden, output }], &pool);
            }
            let mut sums = vec![0.0; work.hidden.len()];
            for (assigned, output) in work.assignments.iter().zip(&outputs) {
                let rows = sums.chunks_mut(width).zip(output.chunks(width)).zip(&assigned.weights);
                rows.for_each(|((sum, value), &weight)| add_weighted(sum, value, weight));
            }
            let expected = if combine == Combine::Client { outputs.concat() } else { sums };
            let done = batcher.run(work).await.unwrap();
            assert!(done.values == expected, "{rows} rows, added up by {combine:?}");
        }
    }
}

#[tokio::test]
async fn a_full_queue_refuses_without_waiting_and_small_work_needs_no_thread() {
    let (checkpoint, _) = bundled();
    let pool = Arc::new(compute_pool(1).unwrap());
    let batcher = Batcher::start(pool, 10).unwrap();
    let small = real(&checkpoint, 1, Combine::Peer);
    assert!(batcher.run(small).now_or_never().unwrap().is_ok(), "computed within the first poll");
    // A pass that does not end: whoever comes now queues.
    batcher.shared.lock().computing = true;
    let mut waiting = Box::pin(batcher.run(real(&checkpoint, 3, Combine::Peer)));
    assert!(waiting.as_mut().now_or_never().is_none());
    let mut same = real(&checkpoint, 3, Combine::Peer);
    same.client = batcher.shared.lock().queue.take(Instant::now())[0].0.work.client;
    batcher.shared.lock().queue.push(Request::new(real(&checkpoint, 3, Combine::Peer)).0, 10).unwrap();
    let refused = batcher.run(same).now_or_never().expect("refused within the first poll");
    assert_eq!(refused.unwrap_err(), WorkError::Full);
    drop(waiting);
}

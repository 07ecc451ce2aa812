//! Turns, bounds, and the same bits whatever the passes.

use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;

use futures::FutureExt;
use hanse_model::{
    Checkpoint, Cpu, Device, DeviceChoice, DeviceError, Expert, HeldJob, MoeSpec, Weights, add_weighted, compute_pool,
    run_held,
};
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
        experts: ExpertStore::new(1, Vec::new()).snapshot(),
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
fn who_asks_for_less_is_done_first_and_nobody_later_than_with_equal_shares() {
    let clients = [client(), client(), client()];
    let mut queue = Queue::default();
    push(&mut queue, rows(clients[0], 3000)).unwrap();
    push(&mut queue, rows(clients[1], 100)).unwrap();
    push(&mut queue, rows(clients[2], 600)).unwrap();
    assert_eq!(pass(&mut queue, &clients), [324, 100, 600]);
    assert_eq!(queue.pairs(), 2676);
    // The first goes on where it was, but for who comes and asks for less.
    push(&mut queue, rows(clients[1], 24)).unwrap();
    assert_eq!(pass(&mut queue, &clients), [1000, 24, 0]);
    assert_eq!(pass(&mut queue, &clients), [1024, 0, 0]);
    assert_eq!(pass(&mut queue, &clients), [652, 0, 0]);
    assert!(queue.is_empty() && queue.pairs() == 0);
}

#[test]
fn equal_requests_are_done_one_after_the_other() {
    let clients: Vec<PeerId> = (0..20).map(|_| client()).collect();
    let mut queue = Queue::default();
    for &client in &clients {
        push(&mut queue, rows(client, 200)).unwrap();
    }
    let first = pass(&mut queue, &clients);
    assert_eq!(first[..6], [200, 200, 200, 200, 200, 24]);
    let second = pass(&mut queue, &clients);
    assert_eq!(second[5..12], [176, 200, 200, 200, 200, 48, 0]);
}

#[test]
fn one_row_is_next_also_where_most_of_those_who_came_together_are_done() {
    for done in 1..16 {
        let (mut queue, late) = (Queue::default(), client());
        (0..16).for_each(|_| queue.push(Request::new(rows(client(), 1024)).0, usize::MAX / 2).unwrap());
        (0..done).for_each(|_| assert_eq!(queue.take(Instant::now()).len(), 1));
        queue.push(Request::new(rows(late, 1)).0, usize::MAX / 2).unwrap();
        assert_eq!(queue.take(Instant::now())[0].0.work.client, late, "after {done} of 16");
    }
}

/// Clients who always have so many requests of so many rows in the queue: pairs that each was served after so many passes, and the most
/// passes that one of its requests took.
fn served(wanted: &[(usize, u32)], passes: usize) -> Vec<(usize, usize)> {
    let clients: Vec<PeerId> = wanted.iter().map(|_| client()).collect();
    let mut queue = Queue::default();
    let mut served = vec![(0, 0); wanted.len()];
    let mut waiting: Vec<Vec<(Arc<Request>, usize)>> = vec![Vec::new(); wanted.len()];
    for number in 0..passes {
        for ((waiting, &client), &(many, pairs)) in waiting.iter_mut().zip(&clients).zip(wanted) {
            while waiting.len() < many {
                let request = Request::new(rows(client, pairs)).0;
                queue.push(request.clone(), usize::MAX / 2).unwrap();
                waiting.push((request, number));
            }
        }
        for (request, range) in queue.take(Instant::now()) {
            let index = clients.iter().position(|client| *client == request.work.client).unwrap();
            served[index].0 += range.len();
            if range.end == request.pairs {
                let place = waiting[index].iter().position(|(other, _)| Arc::ptr_eq(other, &request)).unwrap();
                let (_, since) = waiting[index].remove(place);
                served[index].1 = served[index].1.max(number + 1 - since);
            }
        }
    }
    served
}

#[test]
fn clients_who_always_wait_get_equal_shares_however_they_ask() {
    // One large request at a time, many large ones, many small ones, some in between.
    let wanted = [(1, 1024), (50, 3000), (2000, 1), (3, 700), (64, 100)];
    let served = served(&wanted, 1000);
    let all: usize = served.iter().map(|(pairs, _)| pairs).sum();
    assert_eq!(all, 1000 * queue::PAIRS_PER_PASS);
    for (pairs, _) in &served {
        let share = *pairs as f64 * wanted.len() as f64 / all as f64;
        assert!((0.8..1.25).contains(&share), "{served:?}");
    }
}

#[test]
fn one_row_waits_for_nobody_who_asks_for_much() {
    let wanted: Vec<(usize, u32)> = std::iter::once((1, 1)).chain((0..16).map(|_| (4, 1024))).collect();
    let served = served(&wanted, 200);
    assert_eq!(served[0], (200, 1), "in the next pass, every time");
    let (least, most) = (served[1..].iter().min().unwrap().0, served[1..].iter().max().unwrap().0);
    assert!(most - least <= 2 * 1024, "{served:?}");
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

/// As while a pass is computed, once the last one has ended.
async fn occupy(batcher: &Batcher) {
    while std::mem::replace(&mut batcher.shared.lock().computing, true) {
        tokio::task::yield_now().await;
    }
}

/// A store with experts 0, 1 and 2 of layer 0 on the devices.
fn store_on(checkpoint: &Checkpoint, devices: Vec<Arc<dyn Device>>) -> Arc<ExpertStore> {
    let store = ExpertStore::new(checkpoint.spec().hidden_size, devices);
    assert!(store.add(checkpoint, &[(0, 0), (0, 1), (0, 2)]).unwrap().is_empty());
    Arc::new(store)
}

/// A store on the device that `HANSE_TEST_DEVICE` names, by default the processor.
fn store(checkpoint: &Checkpoint, threads: usize) -> Arc<ExpertStore> {
    let choice = std::env::var("HANSE_TEST_DEVICE").map_or(DeviceChoice::Cpu, |name| name.parse().unwrap());
    store_on(checkpoint, choice.open(Arc::new(compute_pool(threads).unwrap())).unwrap())
}

/// Work of `rows` rows, all for experts 0, 1 and 2 of layer 0.
fn real(checkpoint: &Checkpoint, store: &ExpertStore, rows: u32, combine: Combine) -> Work {
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
    let store = store(&checkpoint, 2);
    let batcher = Batcher::start(store.clone(), 100).unwrap();
    // One in the caller's task, one in a pass of the thread, one in four.
    for rows in [1, 100, 1200] {
        for combine in [Combine::Client, Combine::Peer] {
            let work = real(&checkpoint, &store, rows, combine);
            let mut outputs = vec![vec![0.0; work.hidden.len()]; 3];
            for (expert, output) in outputs.iter_mut().enumerate() {
                let expert = work.experts.expert(0, expert as u32).unwrap();
                assert!(run_held(&mut [HeldJob { expert, hidden: &work.hidden, output }]).is_empty());
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
    let store = store_on(&checkpoint, vec![Arc::new(Cpu::new(Arc::new(compute_pool(1).unwrap())))]);
    let batcher = Batcher::start(store.clone(), 10).unwrap();
    let small = real(&checkpoint, &store, 1, Combine::Peer);
    assert!(batcher.run(small).now_or_never().unwrap().is_ok(), "computed within the first poll");
    // A pass that does not end: whoever comes now queues.
    occupy(&batcher).await;
    let mut waiting = Box::pin(batcher.run(real(&checkpoint, &store, 3, Combine::Peer)));
    assert!(waiting.as_mut().now_or_never().is_none());
    let mut same = real(&checkpoint, &store, 3, Combine::Peer);
    same.client = batcher.shared.lock().queue.take(Instant::now())[0].0.work.client;
    batcher.shared.lock().queue.push(Request::new(real(&checkpoint, &store, 3, Combine::Peer)).0, 10).unwrap();
    let refused = batcher.run(same).now_or_never().expect("refused within the first poll");
    assert_eq!(refused.unwrap_err(), WorkError::Full);
    drop(waiting);
}

/// A device with room for so many experts, which it computes on the processor until it fails.
#[derive(Debug)]
struct Frail {
    cpu: Cpu,
    room: std::sync::atomic::AtomicU64,
    fails: std::sync::atomic::AtomicBool,
}

impl Frail {
    fn new(room: u64) -> Arc<Self> {
        let cpu = Cpu::new(Arc::new(compute_pool(1).unwrap()));
        Arc::new(Self { cpu, room: room.into(), fails: false.into() })
    }

    fn check(&self) -> Result<(), DeviceError> {
        let failed = || DeviceError::Failed { device: "frail".into(), what: "a test", reason: "it was told to".into() };
        if self.fails.load(Relaxed) { Err(failed()) } else { Ok(()) }
    }
}

impl Device for Frail {
    fn name(&self) -> &str {
        "frail"
    }
    fn is_host(&self) -> bool {
        false
    }
    fn free_bytes(&self) -> Result<Option<u64>, DeviceError> {
        self.check().map(|()| Some(self.room.load(Relaxed) * 100))
    }
    fn prepare(&self, _hidden_size: usize, _moe: &MoeSpec) -> Result<(), DeviceError> {
        Ok(())
    }
    fn hold(&self, expert: Expert) -> Result<Weights, DeviceError> {
        self.check()?;
        let no_room = |_| DeviceError::NoRoom { device: "frail".into(), wanted_bytes: expert.bytes(), free_bytes: 0 };
        self.room.fetch_update(Relaxed, Relaxed, |room| room.checked_sub(1)).map_err(no_room)?;
        self.cpu.hold(expert)
    }
    fn run(&self, jobs: &mut [HeldJob<'_>]) -> Result<(), DeviceError> {
        self.check()?;
        self.cpu.run(jobs)
    }
}

#[test]
fn experts_go_where_there_is_most_room_and_those_that_fit_nowhere_are_named() {
    let (checkpoint, width) = bundled();
    let (small, large) = (Frail::new(1), Frail::new(3));
    let store = ExpertStore::new(width, vec![small.clone(), large.clone()]);
    let wanted: Vec<(u32, u32)> = (0..6).map(|expert| (0, expert)).collect();
    assert_eq!(store.capacity(50), 400);
    assert_eq!(store.add(&checkpoint, &wanted).unwrap(), [(0, 4), (0, 5)]);
    let held = store.snapshot();
    let on = |device: &Arc<Frail>| {
        let device: Arc<dyn Device> = device.clone();
        (0..6).filter(|&expert| held.expert(0, expert).is_some_and(|held| held.is_on(&device))).collect::<Vec<_>>()
    };
    assert_eq!((on(&small).len(), on(&large).len()), (1, 3));
    assert_eq!(store.capacity(50), store.bytes(), "nothing is left");
    let bytes = store.bytes();
    store.remove(&[(0, 0)]);
    large.room.store(1, Relaxed);
    assert_eq!(store.capacity(50), store.bytes() + 100);
    assert!(store.add(&checkpoint, &[(0, 5)]).unwrap().is_empty());
    assert_eq!(store.bytes(), bytes);
}

#[tokio::test]
async fn memory_of_experts_that_were_given_up_is_free_when_nobody_computes_with_them_any_more() {
    let (checkpoint, _) = bundled();
    let store = store_on(&checkpoint, vec![Frail::new(3)]);
    let accepted = store.snapshot();
    let mut freed = std::pin::pin!(store.remove(&[(0, 0)]).freed(FAR));
    assert!(freed.as_mut().now_or_never().is_none(), "accepted work has it still");
    drop(accepted);
    tokio::time::timeout(Duration::from_secs(20), freed).await.unwrap();
    let accepted = store.snapshot();
    store.remove(&[(0, 1)]).freed(Duration::ZERO).await;
    assert!(accepted.expert(0, 1).is_some(), "no longer than asked for");
}

#[tokio::test]
async fn a_device_that_fails_loses_its_requests_and_experts_and_no_others() {
    let (checkpoint, width) = bundled();
    let (frail, sound) = (Frail::new(2), Frail::new(1));
    let store = store_on(&checkpoint, vec![frail.clone(), sound]);
    let batcher = Batcher::start(store.clone(), 1000).unwrap();
    let expected = batcher.run(real(&checkpoint, &store, 5, Combine::Client)).await.unwrap().values;
    let failing: Arc<dyn Device> = frail.clone();
    let kept = (0..3).find(|&expert| !store.snapshot().expert(0, expert).unwrap().is_on(&failing)).unwrap();
    frail.fails.store(true, Relaxed);
    // Both in one pass: one request needs the device, the other does not.
    occupy(&batcher).await;
    let all = real(&checkpoint, &store, 5, Combine::Client);
    let mut one = real(&checkpoint, &store, 5, Combine::Client);
    one.assignments.retain(|assigned| assigned.expert == kept);
    let (all, one) = (batcher.run(all), batcher.run(one));
    let both = futures::future::join(all, one);
    tokio::pin!(both);
    assert!(both.as_mut().now_or_never().is_none());
    batcher.shared.lock().computing = false;
    batcher.shared.arrived.notify_one();
    let (all, one) = both.await;
    assert_eq!(all.unwrap_err(), WorkError::Device);
    let rows = 5 * width;
    assert!(one.unwrap().values == expected[kept as usize * rows..][..rows]);
    store.lost().now_or_never().expect("who announces is told");
    assert_eq!((store.len(), store.devices().len()), (1, 1));
    assert!(store.snapshot().expert(0, kept).is_some());
    // And nothing is put there any more.
    assert_eq!(store.add(&checkpoint, &[(0, 9)]).unwrap(), [(0, 9)]);
}

#[tokio::test]
async fn a_device_that_is_lent_is_free_when_its_pass_ends_refuses_what_waits_and_gets_its_experts_back() {
    let (checkpoint, _) = bundled();
    let frail = Frail::new(3);
    let (gone, store) = (Arc::downgrade(&frail), store_on(&checkpoint, vec![frail]));
    let batcher = Batcher::start(store.clone(), 1000).unwrap();
    let expected = batcher.run(real(&checkpoint, &store, 5, Combine::Client)).await.unwrap().values;
    // The pass and what waits hold the experts.
    let in_a_pass = store.snapshot();
    occupy(&batcher).await;
    let mut waits = std::pin::pin!(batcher.run(real(&checkpoint, &store, 5, Combine::Client)));
    assert!(waits.as_mut().now_or_never().is_none());
    let lending = std::thread::spawn({
        let store = store.clone();
        move || store.lend("frail", FAR)
    });
    store.lost().await;
    assert!(store.is_empty() && store.devices().is_empty() && gone.strong_count() > 0);
    assert_eq!(store.lent(), ["frail"]);
    drop(in_a_pass);
    batcher.shared.lock().computing = false;
    batcher.shared.arrived.notify_one();
    assert_eq!(waits.await.unwrap_err(), WorkError::Lent);
    let lent = lending.join().unwrap().unwrap();
    assert_eq!((lent.experts, lent.freed, gone.strong_count()), (3, true, 0));
    assert_eq!(store.lend("frail", FAR), None, "it is not here");
    // What should have been put there waits for it too.
    assert_eq!(store.add(&checkpoint, &[(0, 9)]).unwrap(), [(0, 9)]);
    let again: Arc<dyn Device> = Frail::new(4);
    store.take_back(again.clone());
    assert!(store.lent().is_empty() && store.works(&again));
    let missing = store.take_missing();
    assert_eq!(missing, [(0, 0), (0, 1), (0, 2), (0, 9)]);
    assert!(store.add(&checkpoint, &missing).unwrap().is_empty() && store.take_missing().is_empty());
    assert!(batcher.run(real(&checkpoint, &store, 5, Combine::Client)).await.unwrap().values == expected);
}

#[tokio::test]
async fn who_lends_a_device_waits_no_longer_than_asked_for() {
    let (checkpoint, _) = bundled();
    let store = store_on(&checkpoint, vec![Frail::new(3)]);
    let in_a_pass = store.snapshot();
    let lent = store.lend("frail", Duration::from_millis(20)).unwrap();
    assert!((lent.experts, lent.freed) == (3, false) && in_a_pass.expert(0, 0).is_some());
}

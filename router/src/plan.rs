//! Which replica computes what: the choice of peers for the rows of one layer. Pure; no clock, no sockets.

use std::hash::{Hash, Hasher};
use std::time::Duration;

use hanse_protocol::{ExpertRows, PeerId};

/// Peers whose score is at least this share of the best one's are taken in turn: measured times are no better than that.
pub const ABOUT_AS_GOOD: f64 = 0.75;

/// A peer that could be asked, as the plan sees it.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Who it is.
    pub peer: PeerId,
    /// For each wanted expert, in the order they are wanted: whether this peer hosts it.
    pub hosts: Vec<bool>,
    /// Network round trip plus what waits in its queue.
    pub overhead: Duration,
    /// Expected computing time for one (row, expert) pair.
    pub per_assignment: Duration,
}

/// What one peer is asked to compute.
#[derive(Debug, Clone, PartialEq)]
pub struct Share {
    /// Who is asked.
    pub peer: PeerId,
    /// Its experts, ascending, and their rows.
    pub assignments: Vec<ExpertRows>,
}

/// Splits `wanted` (ascending experts, each with at least one row) among the candidates.
///
/// Greedy weighted set cover: again and again the peer that covers the most work per expected time is taken, so that a
/// token meets few, near and idle peers. Peers that are about as good ([`ABOUT_AS_GOOD`]) are taken by a hash of their id and
/// `salt`: with a salt per client and layer the work spreads over replicas, while each client goes on asking the same peer for the
/// same experts. The result does not depend on the order of the candidates. An expert goes to one peer as a whole.
///
/// # Errors
/// The experts that no candidate hosts.
pub fn plan(wanted: &[ExpertRows], candidates: &[Candidate], salt: u64) -> Result<Vec<Share>, Vec<u32>> {
    let mut open: Vec<usize> = (0..wanted.len()).collect();
    let unhosted: Vec<u32> = open
        .iter()
        .filter(|&&i| !candidates.iter().any(|c| c.hosts.get(i) == Some(&true)))
        .map(|&i| wanted[i].expert)
        .collect();
    if !unhosted.is_empty() {
        return Err(unhosted);
    }
    let mut shares = Vec::new();
    while !open.is_empty() {
        let covers = |c: &Candidate| open.iter().filter(|&&i| c.hosts[i]).map(|&i| wanted[i].rows.len()).sum::<usize>();
        let score = |c: &Candidate| {
            let work = covers(c);
            let time = c.overhead.as_secs_f64() + c.per_assignment.as_secs_f64() * work as f64;
            work as f64 / time.max(1e-9)
        };
        let scored: Vec<(f64, &Candidate)> =
            candidates.iter().filter(|c| covers(c) > 0).map(|c| (score(c), c)).collect();
        let best_score = scored.iter().map(|(score, _)| *score).fold(0.0, f64::max);
        let good = scored.iter().filter(|(score, _)| *score >= best_score * ABOUT_AS_GOOD);
        let Some((_, best)) = good.min_by_key(|(_, c)| (turn(&c.peer, salt), c.peer)) else {
            // Every open expert has a candidate (checked above), so this is not reached.
            return Err(open.iter().map(|&i| wanted[i].expert).collect());
        };
        let (taken, left): (Vec<usize>, Vec<usize>) = open.iter().partition(|&&i| best.hosts[i]);
        open = left;
        shares.push(Share { peer: best.peer, assignments: taken.into_iter().map(|i| wanted[i].clone()).collect() });
    }
    Ok(shares)
}

fn turn(peer: &PeerId, salt: u64) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    (salt, peer).hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use hanse_protocol::Identity;

    fn want(experts: &[u32]) -> Vec<ExpertRows> {
        experts.iter().map(|&expert| ExpertRows { expert, rows: vec![0], weights: vec![1.0] }).collect()
    }

    fn candidate(hosts: &[bool], overhead_ms: u64) -> Candidate {
        Candidate {
            peer: Identity::generate().peer_id(),
            hosts: hosts.to_vec(),
            overhead: Duration::from_millis(overhead_ms),
            per_assignment: Duration::from_micros(10),
        }
    }

    #[test]
    fn one_peer_that_hosts_everything_is_asked_alone() {
        let candidates = [candidate(&[true, false], 1), candidate(&[true, true], 1), candidate(&[false, true], 1)];
        let shares = plan(&want(&[3, 5]), &candidates, 0).unwrap();
        assert_eq!(shares.len(), 1);
        assert_eq!(shares[0].peer, candidates[1].peer);
    }

    #[test]
    fn the_nearer_of_two_replicas_is_asked() {
        let candidates = [candidate(&[true], 50), candidate(&[true], 5)];
        assert_eq!(plan(&want(&[1]), &candidates, 0).unwrap()[0].peer, candidates[1].peer);
    }

    #[test]
    fn every_wanted_expert_is_given_out_exactly_once() {
        let candidates = [
            candidate(&[true, true, false, false], 1),
            candidate(&[false, true, true, false], 2),
            candidate(&[false, false, true, true], 3),
        ];
        let shares = plan(&want(&[0, 4, 7, 9]), &candidates, 0).unwrap();
        let mut experts: Vec<u32> = shares.iter().flat_map(|s| s.assignments.iter().map(|a| a.expert)).collect();
        experts.sort_unstable();
        assert_eq!(experts, [0, 4, 7, 9]);
        for share in shares {
            assert!(share.assignments.is_sorted_by_key(|a| a.expert), "frames need ascending experts");
        }
    }

    #[test]
    fn experts_that_nobody_hosts_are_named() {
        let candidates = [candidate(&[true, false, false], 1)];
        assert_eq!(plan(&want(&[0, 4, 7]), &candidates, 0).unwrap_err(), [4, 7]);
        assert_eq!(plan(&want(&[2]), &[], 0).unwrap_err(), [2]);
    }

    #[test]
    fn equal_peers_share_the_layers() {
        let candidates = [candidate(&[true], 1), candidate(&[true], 1)];
        let chosen = |salt| plan(&want(&[0]), &candidates, salt).unwrap()[0].peer;
        let first = (0..64).filter(|&salt| chosen(salt) == candidates[0].peer).count();
        assert!((8..=56).contains(&first), "{first} of 64");
        assert_eq!(chosen(5), chosen(5));
    }

    #[test]
    fn the_order_of_the_candidates_does_not_matter() {
        let mut candidates = vec![candidate(&[true, true], 1), candidate(&[true, true], 1)];
        let first = plan(&want(&[0, 1]), &candidates, 0).unwrap();
        candidates.reverse();
        assert_eq!(plan(&want(&[0, 1]), &candidates, 0).unwrap(), first);
    }
}

//! Who can be asked for what at present.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use hanse_protocol::{ExpertRows, ModelId, PeerId, Precision};

use super::{Directory, Member};
use crate::plan::Candidate;
use crate::precision::Offer;
use crate::stats::{Expectation, PeerStats};

impl Directory {
    /// The model of which a peer hosts experts, which may be a variant of the client's, and how it stores them; `None` where only the
    /// client's is accepted.
    pub(crate) fn form_of(&self, peer: &PeerId) -> Option<(ModelId, Precision)> {
        self.forms.as_ref()?;
        self.read().get(peer).map(|member| (member.advert.model, member.advert.precision))
    }

    /// The peers that can be called now for some of `wanted` experts of `layer`, all for the same stored form of each. Peers that were set aside are among
    /// them only with `also_avoided`: they are the last resort.
    pub(crate) fn candidates(
        &self,
        layer: u32,
        wanted: &[ExpertRows],
        except: &[PeerId],
        also_avoided: bool,
        now: Instant,
    ) -> Vec<Candidate> {
        let usable = |peer: &PeerId, member: &Member| {
            let connected = member.link.as_ref().is_some_and(|link| !link.connection.is_closed());
            let avoided = member.probe_at.is_some() || member.busy_until.is_some_and(|until| now < until);
            connected && !except.contains(peer) && (also_avoided || !(avoided || member.advert.draining.is_some()))
        };
        let members = self.read();
        let forms = self.forms_of(&members, layer, wanted);
        let hosts = |member: &Member, (place, want): (usize, &ExpertRows)| {
            let of_the_form = |forms: &Vec<Option<ModelId>>| forms[place] == Some(member.advert.model);
            forms.as_ref().is_none_or(of_the_form) && member.advert.hosted.contains(layer, want.expert)
        };
        members
            .iter()
            .filter(|(peer, member)| usable(peer, member))
            .map(|(&peer, member)| Candidate {
                peer,
                hosts: wanted.iter().enumerate().map(|want| hosts(member, want)).collect(),
                overhead: member.stats.overhead(now, member.round_trip()) + member.stats.failure_cost(now),
                per_assignment: member.stats.per_assignment(),
            })
            .filter(|candidate| candidate.hosts.contains(&true))
            .collect()
    }

    /// For each of `wanted` the model in whose form it is computed, `None` where nobody who is connected hosts it; nothing where only one
    /// form is accepted.
    fn forms_of(
        &self,
        members: &HashMap<PeerId, Member>,
        layer: u32,
        wanted: &[ExpertRows],
    ) -> Option<Vec<Option<ModelId>>> {
        let forms = self.forms.as_ref()?;
        let form = |want: &ExpertRows| {
            let offers: Vec<Offer> = members
                .values()
                .filter(|m| m.link.as_ref().is_some_and(|link| !link.connection.is_closed()))
                .filter(|m| m.advert.hosted.contains(layer, want.expert))
                .map(|m| Offer {
                    model: m.advert.model,
                    precision: m.advert.precision,
                    well: m.probe_at.is_none() && m.advert.draining.is_none(),
                })
                .collect();
            forms.choose(layer, want.expert, &offers)
        };
        Some(wanted.iter().map(form).collect())
    }

    /// How long a call of `assignments` pairs to `peer` should take.
    pub(crate) fn expectation(&self, peer: &PeerId, assignments: usize, now: Instant) -> Expectation {
        let members = self.read();
        // A peer that has left meanwhile is late as a new one would be.
        let Some(member) = members.get(peer) else {
            return PeerStats::default().expectation(now, Duration::ZERO, assignments);
        };
        member.stats.expectation(now, member.round_trip(), assignments)
    }

    /// The most rows in one frame that every connected peer accepts.
    pub(crate) fn max_rows(&self) -> usize {
        let members = self.read();
        let least = members.values().filter_map(|member| member.link.as_ref()).map(|link| link.welcome.max_rows).min();
        least.map_or(1, |rows| rows.max(1) as usize)
    }
}

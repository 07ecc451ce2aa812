//! Tokens per second against the length of the context, without a round trip: where it would matter most.

use hanse_node::testnet::split;
use hanse_protocol::WireDtype;

use super::Measured;
use super::curve::{Axis, Curve, Rounds};
use super::law;
use super::net::{Net, Setup, decode};
use super::record;

/// Of the model's longest context, in percent: what is there before the tokens that are timed.
const CONTEXTS_PERCENT: [usize; 5] = [3, 25, 50, 75, 90];
/// The most tokens that are timed behind each.
const TOKENS: usize = 48;

pub(super) async fn run(setup: &Setup) -> anyhow::Result<Measured> {
    let mut net = Net::start(setup, split(&setup.layout, setup.nodes, 1), WireDtype::F32).await?;
    let tokens = setup.max_tokens.min(TOKENS);
    let contexts = CONTEXTS_PERCENT.map(|percent| setup.context() * percent / 100);
    let middle = |context: usize| (context + tokens / 2) as f64;
    let prompt = |context| vec![setup.prompt(0, context)];
    let (least, most) = (contexts[0], contexts[contexts.len() - 1]);
    let passes = setup.record_decoding(prompt(least), tokens).await?;
    net.path(setup, 0.0, 0.0).await?;
    let mut rounds = Rounds::default();
    for round in 0..=setup.rounds {
        let served_ms = record::median_ms(&net.replay(&passes).await?);
        let short_ms = setup.trunk_ms(prompt(least), tokens, &passes).await?;
        let long_ms = setup.trunk_ms(prompt(most), tokens, &passes).await?;
        for context in contexts {
            setup.bar.set_message(format!("context: round {round}, {context}"));
            let trunk_ms = law::line((middle(least), short_ms), (middle(most), long_ms), middle(context));
            let law_ms = law::step(trunk_ms, served_ms, setup.layers(), 0.0);
            let decoded = decode(&net.client, prompt(context), tokens).await?;
            // The first round computes the prompts, which are kept.
            if round > 0 {
                rounds.add(middle(context), decoded.tokens_per_second, 1e3 / law_ms);
                rounds.explain(middle(context), decoded.parts(trunk_ms, served_ms));
            }
        }
    }
    net.stop().await;
    Ok(Measured::curve(Curve {
        name: "context",
        title: "Tokens per second and context, without a round trip",
        x: Axis::linear("tokens in the context"),
        y: Axis::linear("tokens/s"),
        series: vec![rounds.series("")],
    }))
}

//! What was said so far, and how much of it the model still sees.

use hanse_model::ChatMessage;

/// Questions with their answers, oldest first.
#[derive(Debug)]
pub(super) struct Conversation {
    system: Option<String>,
    turns: Vec<(String, String)>,
}

impl Conversation {
    pub(super) fn new(system: Option<String>) -> Self {
        Self { system, turns: Vec::new() }
    }

    /// What the model is told before everything else from now on; nothing if it is empty.
    pub(super) fn set_system(&mut self, text: &str) {
        self.system = (!text.is_empty()).then(|| text.to_owned());
    }

    /// Forgets all turns.
    pub(super) fn reset(&mut self) {
        self.turns.clear();
    }

    pub(super) fn answered(&mut self, question: String, answer: String) {
        self.turns.push((question, answer));
    }

    /// Removes the last turn and returns its question.
    pub(super) fn take_last(&mut self) -> Option<String> {
        self.turns.pop().map(|(question, _)| question)
    }

    /// The prompt that asks `question`, of at most `limit` tokens: the oldest turns are forgotten until it fits, and their number is the
    /// second value. A question that does not fit alone makes a longer prompt.
    ///
    /// # Errors
    /// What `encode` says; nothing is forgotten then.
    pub(super) fn fit<E>(
        &mut self,
        question: &str,
        limit: usize,
        encode: impl Fn(&[ChatMessage]) -> Result<Vec<u32>, E>,
    ) -> Result<(Vec<u32>, usize), E> {
        let mut dropped = 0;
        let mut prompt = encode(&self.messages(question, dropped))?;
        while prompt.len() > limit && dropped < self.turns.len() {
            dropped += 1;
            prompt = encode(&self.messages(question, dropped))?;
        }
        self.turns.drain(..dropped);
        Ok((prompt, dropped))
    }

    fn messages(&self, question: &str, skipped: usize) -> Vec<ChatMessage> {
        let message = |role: &str, content: &str| ChatMessage { role: role.to_owned(), content: content.to_owned() };
        let mut messages: Vec<ChatMessage> = self.system.iter().map(|text| message("system", text)).collect();
        for (asked, answered) in self.turns.iter().skip(skipped) {
            messages.extend([message("user", asked), message("assistant", answered)]);
        }
        messages.push(message("user", question));
        messages
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    /// A token for each character, and a space between messages.
    fn encode(messages: &[ChatMessage]) -> Result<Vec<u32>, Infallible> {
        let texts: Vec<&str> = messages.iter().map(|message| message.content.as_str()).collect();
        Ok(texts.join(" ").chars().map(u32::from).collect())
    }

    fn shown(conversation: &mut Conversation, question: &str, limit: usize) -> (String, usize) {
        let (prompt, dropped) = conversation.fit(question, limit, encode).unwrap();
        (prompt.into_iter().filter_map(char::from_u32).collect(), dropped)
    }

    #[test]
    fn a_conversation_longer_than_the_context_loses_its_oldest_turns() {
        let mut conversation = Conversation::new(Some("s".to_owned()));
        for (question, answer) in [("q1", "a1"), ("q2", "a2"), ("q3", "a3")] {
            conversation.answered(question.to_owned(), answer.to_owned());
        }
        assert_eq!(shown(&mut conversation, "q4", 100), ("s q1 a1 q2 a2 q3 a3 q4".to_owned(), 0));
        assert_eq!(shown(&mut conversation, "q4", 10), ("s q3 a3 q4".to_owned(), 2));
        assert_eq!(shown(&mut conversation, "q4", 10), ("s q3 a3 q4".to_owned(), 0), "forgotten once");
        assert_eq!(shown(&mut conversation, "much too long", 10), ("s much too long".to_owned(), 1));
    }

    #[test]
    fn a_question_that_is_asked_again_is_not_answered_yet() {
        let mut conversation = Conversation::new(None);
        assert_eq!(conversation.take_last(), None);
        conversation.answered("q1".to_owned(), "a1".to_owned());
        let question = conversation.take_last().unwrap();
        assert_eq!(shown(&mut conversation, &question, 100), ("q1".to_owned(), 0));
    }

    #[test]
    fn what_cannot_be_encoded_is_not_forgotten_for_that() {
        let mut conversation = Conversation::new(None);
        conversation.answered("q1".to_owned(), "a1".to_owned());
        assert!(conversation.fit("q2", 0, |_| Err(())).is_err());
        conversation.set_system("");
        assert_eq!(shown(&mut conversation, "q2", 100), ("q1 a1 q2".to_owned(), 0));
    }
}

//! What becomes of a keyed request once its record is known: an answer from it, a wait, or a forward.

use super::forward::TaskAnswer;
use super::probe::Caller;
use super::problem::Problem;
use super::{Counted, Gateway, Intercepted, Unrecorded, reply, unavailable};
use crate::ledger::{Answer, Arrival, Arrived, Held, Settlement, StillInProgress};
use crate::telemetry::Outcome;
use std::future::Future;
use std::sync::Arc;
use tokio::time::Instant;

impl Gateway {
    /// Replays, waits, refuses or claims, until there is an answer.
    pub(super) async fn settle_on(
        self: &Arc<Self>,
        arrival: Arrival,
        mut body: Held,
        intercepted: Box<Intercepted>,
        caller: Option<&Caller>,
    ) -> Result<Counted, Problem> {
        let deadline = Instant::now() + intercepted.route.options.wait_timeout;
        let mut waited = false;
        // One of the two is there: the request as it came, or made ready to be forwarded.
        let (mut intercepted, mut forward) = (Some(intercepted), None);
        loop {
            let settled = match self.ledger.arrive(&arrival, &mut body) {
                Arrived::Answer(answer) => return self.show(answer, waited, caller).await,
                Arrived::Wait(waiting) => self.wait(waiting.settled(deadline)).await?,
                Arrived::Lead(lead) => {
                    let Ok(permit) = Arc::clone(&self.in_flight).try_acquire_owned() else {
                        drop(lead);
                        return self.answer_without_a_forward(&arrival, waited, caller).await;
                    };
                    let ready = match intercepted.take() {
                        Some(intercepted) => Some(self.forward(*intercepted, &body)),
                        None => forward.take(),
                    };
                    let Some(ready) = ready else { return Err(Problem::in_progress(false)) };
                    match ready.start(lead, body.clone(), permit).await {
                        TaskAnswer::Respond(response, outcome) => return Ok((response, outcome)),
                        TaskAnswer::Problem(problem) => return Err(problem),
                        TaskAnswer::Record(answer) => return self.show(answer, waited, caller).await,
                        TaskAnswer::Elsewhere(ready, elsewhere) => {
                            forward = Some(ready);
                            self.wait(elsewhere.settled(deadline)).await?
                        }
                    }
                }
            };
            waited = true;
            match settled {
                Settlement::Recorded(record) => {
                    if let Some(answer) = self.ledger.answer_from(&arrival, &record) {
                        return self.show(answer, waited, caller).await;
                    }
                }
                Settlement::NotExecuted { response, credentials } if credentials == arrival.credentials => {
                    return response.respond(Outcome::waited);
                }
                Settlement::Undecided { answer, credentials } if credentials == arrival.credentials => {
                    return self.answer(&answer, waited);
                }
                Settlement::NotExecuted { .. } | Settlement::Undecided { .. } | Settlement::Again => {}
            }
        }
    }

    async fn wait(
        &self,
        settled: impl Future<Output = Result<Settlement<Unrecorded>, StillInProgress>>,
    ) -> Result<Settlement<Unrecorded>, Problem> {
        let _counted = self.metrics.waiter();
        settled.await.map_err(|still| Problem::in_progress(still.late))
    }

    /// As many forwards are under way as may be: what is recorded is answered all the same.
    async fn answer_without_a_forward(
        &self,
        arrival: &Arrival,
        waited: bool,
        caller: Option<&Caller>,
    ) -> Result<Counted, Problem> {
        match self.ledger.look_up(arrival).await {
            Ok(Some(answer)) => self.show(answer, waited, caller).await,
            Ok(None) => Err(Problem::overloaded()),
            Err(error) => Err(unavailable(&error)),
        }
    }

    /// Answers, once it is known that the caller may see what the record holds.
    pub(super) async fn show(&self, answer: Answer, waited: bool, caller: Option<&Caller>) -> Result<Counted, Problem> {
        if let Some(caller) = caller
            && matches!(answer, Answer::Replay(_) | Answer::BodyNotRecorded { .. })
            && let Some(refusal) = self.probe(caller).await?
        {
            return refusal.respond(Outcome::rejected);
        }
        self.answer(&answer, waited)
    }

    pub(super) fn answer(&self, answer: &Answer, waited: bool) -> Result<Counted, Problem> {
        match answer {
            Answer::Replay(record) => match reply::replay(record, self.ledger.now()) {
                Some(response) => Ok((response, if waited { Outcome::waited } else { Outcome::replayed })),
                // It was executed, that much is sure; a record like this cannot be written by this program.
                None => Err(Problem::body_not_recorded(0, None)),
            },
            Answer::KeyReused => Err(Problem::key_reused()),
            Answer::InProgress { late } => Err(Problem::in_progress(*late)),
            Answer::OutcomeUnknown => Err(Problem::outcome_unknown()),
            Answer::BodyNotRecorded { status, location } => {
                Err(Problem::body_not_recorded(*status, location.as_deref()))
            }
        }
    }
}

//! Logs: who may read one, and of which instance. What is in it is the backend's to tell.

use agentd_core::access::Right;
use agentd_core::error::Problem;
use agentd_core::instance::Target;
use agentd_core::operation::Identity;

use super::{Engine, Peer, explain};
use crate::backend::{LogAsk, LogFrames};

impl Engine {
    /// The log of the instance that has this name now; it stays that instance's, whoever gets the name while it is read.
    pub async fn logs(&self, peer: &Peer, target: &Target, ask: &LogAsk) -> Result<LogFrames, Problem> {
        let observed = self.find(peer, target).await?;
        self.authorize(peer, Right::Logs, &observed, target)?;
        let kind = observed.reference.kind();
        let log = self.backend(kind)?.logs(&observed.reference, &Identity::of(&observed), ask).await;
        log.map_err(|error| explain(kind, error))
    }
}

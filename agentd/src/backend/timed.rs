//! A backend that counts how long its calls take and how they end, around another one that does the work. Each call of the
//! trait must be handed on here: one that is forgotten would be answered by the trait's default.

use std::sync::Arc;
use std::time::Instant;

use agentd_core::instance::{Kind, Observed, Ref};
use agentd_core::operation::Identity;
use agentd_core::plan::{Action, Preparation, Redefinition};
use agentd_core::usage::Counters;
use async_trait::async_trait;
use tokio::sync::mpsc;

use super::{Backend, BackendError, LogAsk, LogFrames, Look, Notice};
use crate::metrics::Metrics;

/// The one that counts.
pub(crate) struct Timed {
    inner: Arc<dyn Backend>,
    metrics: Metrics,
}

impl Timed {
    /// Around this one.
    pub(crate) fn new(inner: Arc<dyn Backend>, metrics: Metrics) -> Self {
        Timed { inner, metrics }
    }

    async fn time<T>(
        &self,
        call: &str,
        work: impl Future<Output = Result<T, BackendError>> + Send,
    ) -> Result<T, BackendError> {
        let began = Instant::now();
        let answer = work.await;
        let result = answer.as_ref().map_or_else(|error| error.code().as_str(), |_| "ok");
        self.metrics.called(self.inner.kind(), call, result, began.elapsed());
        answer
    }
}

#[async_trait]
impl Backend for Timed {
    fn kind(&self) -> Kind {
        self.inner.kind()
    }

    fn name(&self) -> String {
        self.inner.name()
    }

    async fn health(&self) -> Result<String, BackendError> {
        self.time("health", self.inner.health()).await
    }

    async fn list(&self) -> Result<Vec<Observed>, BackendError> {
        self.time("list", self.inner.list()).await
    }

    async fn stirred(&self) -> Result<Vec<String>, BackendError> {
        self.time("stirred", self.inner.stirred()).await
    }

    async fn observe(&self, name: &str, look: Look) -> Result<Observed, BackendError> {
        self.time("observe", self.inner.observe(name, look)).await
    }

    async fn counters(&self, observed: &Observed) -> Result<Counters, BackendError> {
        self.time("counters", self.inner.counters(observed)).await
    }

    async fn apply(&self, target: &Ref, identity: &Identity, action: &Action) -> Result<(), BackendError> {
        self.time("apply", self.inner.apply(target, identity, action)).await
    }

    async fn redefine(
        &self,
        target: &Ref,
        identity: &Identity,
        redefinition: &Redefinition,
    ) -> Result<Preparation, BackendError> {
        self.time("redefine", self.inner.redefine(target, identity, redefinition)).await
    }

    async fn logs(&self, target: &Ref, identity: &Identity, ask: &LogAsk) -> Result<LogFrames, BackendError> {
        self.time("logs", self.inner.logs(target, identity, ask)).await
    }

    async fn is_under_way(&self, identity: &Identity) -> bool {
        self.inner.is_under_way(identity).await
    }

    async fn watch(&self, notices: mpsc::Sender<Notice>) -> BackendError {
        self.inner.watch(notices).await
    }

    fn recall(&self, observed: &Observed) {
        self.inner.recall(observed);
    }

    fn may_have_been_asked(&self, action: &Action, observed: &Observed) {
        self.inner.may_have_been_asked(action, observed);
    }
}

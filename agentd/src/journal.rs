//! The record of operations as the executor sees it: a write is durable when it returns. In memory here; a store on disk
//! takes its place behind the same trait.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use agentd_core::instance::Ref;
use agentd_core::operation::Operation;
use async_trait::async_trait;

/// Why an operation could not be recorded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the record of operations can't be written: {0}")]
pub struct JournalError(pub String);

/// Where operations are recorded.
#[async_trait]
pub trait Journal: Send + Sync {
    /// Records an operation as it stands: its intent before the first step, a mark before each step, its outcome before the
    /// reply. Durable when it returns.
    async fn write(&self, operation: &Operation) -> Result<(), JournalError>;

    /// An operation by its id.
    fn get(&self, id: &str) -> Option<Operation>;

    /// The newest operations first, those of one instance where it is named.
    fn newest(&self, reference: Option<&Ref>, limit: usize) -> Vec<Operation>;
}

/// How many operations are remembered in memory.
const KEPT: usize = 1024;

/// Operations in memory, the newest [`KEPT`] of them; they go when the daemon does.
#[derive(Debug, Default)]
pub struct MemoryJournal {
    operations: Mutex<VecDeque<Operation>>,
}

#[async_trait]
impl Journal for MemoryJournal {
    async fn write(&self, operation: &Operation) -> Result<(), JournalError> {
        let mut operations = self.operations.lock().unwrap_or_else(PoisonError::into_inner);
        // An operation that is written again is nearly always among the last ones.
        match operations.iter_mut().rev().find(|known| known.id == operation.id) {
            Some(known) => *known = operation.clone(),
            None => operations.push_back(operation.clone()),
        }
        while operations.len() > KEPT {
            operations.pop_front();
        }
        Ok(())
    }

    fn get(&self, id: &str) -> Option<Operation> {
        let operations = self.operations.lock().unwrap_or_else(PoisonError::into_inner);
        operations.iter().rev().find(|operation| operation.id == id).cloned()
    }

    fn newest(&self, reference: Option<&Ref>, limit: usize) -> Vec<Operation> {
        let operations = self.operations.lock().unwrap_or_else(PoisonError::into_inner);
        let matching = |operation: &&Operation| reference.is_none_or(|reference| operation.reference == *reference);
        operations.iter().rev().filter(matching).take(limit).cloned().collect()
    }
}

//! Refusals in the journal: each is told, but not without end. Who asks again and again for what it may not have must not push
//! out what others did.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// One uid's refusals are told one by one up to this many in a period; the rest of them as a number.
const MOST: u32 = 20;
/// The period.
const PERIOD: Duration = Duration::from_secs(60);

/// How many refusals each uid has had in its present period.
#[derive(Debug, Default)]
pub(super) struct Refusals(Mutex<HashMap<u32, (Instant, u32)>>);

impl Refusals {
    /// Whether one more of this uid is to be told, and how many were left out in the period before.
    pub(super) fn one_more(&self, uid: u32) -> (bool, u32) {
        let now = Instant::now();
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Uids that are quiet are forgotten when there are many.
        if counts.len() > 1024 {
            counts.retain(|_, (since, _)| now.duration_since(*since) < PERIOD);
        }
        let (since, count) = counts.entry(uid).or_insert((now, 0));
        let mut left_out = 0;
        if now.duration_since(*since) >= PERIOD {
            left_out = count.saturating_sub(MOST);
            (*since, *count) = (now, 0);
        }
        *count = count.saturating_add(1);
        (*count <= MOST, left_out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_that_asks_without_end_is_told_as_a_number_and_hides_nobody_else() {
        let refusals = Refusals::default();
        let told = (0..100).filter(|_| refusals.one_more(1000).0).count();
        assert_eq!(told, 20);
        assert_eq!(refusals.one_more(1001), (true, 0));
        tokio::time::advance(PERIOD).await;
        assert_eq!(refusals.one_more(1000), (true, 80));
        assert_eq!(refusals.one_more(1000), (true, 0));
    }
}

//! How many of a thing there may be at once: in all, and of one uid, with room kept for root. Knows not of what.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// The bounds of a crowd.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// In all.
    pub all: usize,
    /// Of one uid that isn't root.
    pub a_uid: usize,
    /// Places of the whole that only root gets, so that it is served while others crowd.
    pub roots: usize,
}

/// Counts by uid; a place is given back when it is dropped. Clones share one count.
#[derive(Debug, Clone)]
pub(super) struct Crowd {
    bounds: Bounds,
    counts: Arc<Mutex<HashMap<u32, usize>>>,
}

/// One of the crowd.
#[derive(Debug)]
pub(super) struct Place {
    crowd: Crowd,
    uid: u32,
}

impl Crowd {
    pub(super) fn new(bounds: Bounds) -> Self {
        Crowd { bounds, counts: Arc::default() }
    }

    /// A place, where there is one.
    pub(super) fn enter(&self, uid: u32) -> Option<Place> {
        let Bounds { all: most, a_uid, roots } = self.bounds;
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = counts.values().sum();
        let own = counts.get(&uid).copied().unwrap_or_default();
        let fits = if uid == 0 { all < most } else { own < a_uid && all < most - roots };
        if !fits {
            return None;
        }
        *counts.entry(uid).or_default() += 1;
        Some(Place { crowd: self.clone(), uid })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.crowd.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.uid) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.uid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uid_has_its_share_and_root_finds_room_while_others_crowd() {
        let crowd = Crowd::new(Bounds { all: 5, a_uid: 2, roots: 1 });
        let mut places: Vec<_> = [1, 1, 2, 2].into_iter().filter_map(|uid| crowd.enter(uid)).collect();
        assert_eq!(places.len(), 4);
        assert!(crowd.enter(1).is_none(), "its share is used up");
        assert!(crowd.enter(3).is_none(), "what is left is root's");
        places.extend(crowd.enter(0));
        assert_eq!(places.len(), 5);
        assert!(crowd.enter(0).is_none(), "all is all, for root too");
    }

    #[test]
    fn a_place_that_is_dropped_is_anybodys_again() {
        let crowd = Crowd::new(Bounds { all: 1, a_uid: 1, roots: 0 });
        let place = crowd.enter(1);
        assert!(place.is_some() && crowd.enter(2).is_none());
        drop(place);
        assert!(crowd.enter(2).is_some());
        assert!(crowd.counts.lock().unwrap().is_empty(), "who is gone is not remembered");
    }
}

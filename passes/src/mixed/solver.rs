//! One choice for each item, so that the costs add up to the least that a budget of bytes allows: the multiple-choice
//! knapsack (Kellerer, Pferschy, Pisinger, "Knapsack Problems", 2004, chapter 11).
//!
//! Exact by dynamic programming over dominance: after each item only those partial sums stay that no other one beats in
//! both bytes and cost (section 11.5). Bytes are never rounded. There are never more sums than bytes between the least
//! and the most, divided by what all sizes have in common, and far fewer in models, whose layers are alike. Where there
//! are more than fit in memory, the frontier is thinned, and says so; the answer for one budget is then found by
//! a second run, which drops every sum that the linear relaxation proves too costly (section 11.2).

use std::cmp::Ordering;

/// Partial sums that are kept over all items together, at 8 bytes each.
const MAX_SUMS: usize = 1 << 25;

/// One thing that may be chosen for an item.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Offer {
    /// What the caller calls it.
    pub id: usize,
    /// Bytes that it takes; negative where it frees some.
    pub bytes: i64,
    /// What it costs; finite.
    pub cost: f64,
}

/// The choices for each item, at least one.
pub type Items = [Vec<Offer>];

/// Sums over all items.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sum {
    /// Bytes.
    pub bytes: i64,
    /// Costs, added in the order of the items.
    pub cost: f64,
}

/// A choice for each item.
#[derive(Clone, Debug, PartialEq)]
pub struct Solution {
    /// The sums.
    pub sum: Sum,
    /// The `id` of each item's choice.
    pub picks: Vec<usize>,
    /// Whether no other choice within the budget is better.
    pub exact: bool,
}

/// Every sum that no other one beats, from the fewest bytes to the least cost.
#[derive(Clone, Debug)]
pub struct Frontier {
    /// Bytes grow and costs fall, both strictly.
    pub points: Vec<Sum>,
    /// Whether no point was dropped for want of memory.
    pub exact: bool,
    /// By item and sum: the sum before it, and the choice.
    steps: Vec<Vec<Step>>,
}

#[derive(Clone, Copy, Debug)]
struct Step {
    from: u32,
    id: u32,
}

impl Frontier {
    /// Of the points that fit in `budget` bytes, the one of least cost.
    pub fn within(&self, budget: i64) -> Option<usize> {
        self.points.partition_point(|p| p.bytes <= budget).checked_sub(1)
    }

    /// The choices that make a point.
    pub fn solution(&self, point: usize) -> Solution {
        let mut at = point;
        let mut picks: Vec<usize> = Vec::with_capacity(self.steps.len());
        for steps in self.steps.iter().rev() {
            picks.push(steps[at].id as usize);
            at = steps[at].from as usize;
        }
        picks.reverse();
        Solution { sum: self.points[point], picks, exact: self.exact }
    }
}

/// All that no other choice beats.
pub fn frontier(items: &Items) -> Frontier {
    sums(items, MAX_SUMS, |_| |_: &Sum| true)
}

/// The least cost within `budget` bytes; `None` when even the smallest choices take more. Of equal costs it is the one
/// of the fewest bytes. `all` is the [`frontier`] of the same items.
pub fn solve(items: &Items, budget: i64, all: &Frontier) -> Option<Solution> {
    let found = all.solution(all.within(budget)?);
    match all.exact {
        true => Some(found),
        false => bounded(items, budget, MAX_SUMS).or(Some(found)),
    }
}

/// The same, but each step takes what saves the most cost for a byte, as long as it fits.
pub fn greedy(items: &Items, budget: i64) -> Option<Solution> {
    let items: Vec<Vec<Offer>> = items.iter().map(|c| undominated(c)).collect();
    let mut at = vec![0; items.len()];
    let mut left = budget - items.iter().map(|c| c[0].bytes).sum::<i64>();
    if left < 0 {
        return None;
    }
    let rate = |from: &Offer, to: &Offer| (from.cost - to.cost) / (to.bytes - from.bytes) as f64;
    loop {
        let mut best: Option<(f64, usize, usize)> = None;
        for (i, choices) in items.iter().enumerate() {
            let now = &choices[at[i]];
            for (c, choice) in choices.iter().enumerate().skip(at[i] + 1) {
                let rate = rate(now, choice);
                if choice.bytes - now.bytes <= left && best.is_none_or(|b| rate > b.0) {
                    best = Some((rate, i, c));
                }
            }
        }
        let Some((_, i, c)) = best else { break };
        left -= items[i][c].bytes - items[i][at[i]].bytes;
        at[i] = c;
    }
    let chosen: Vec<&Offer> = items.iter().zip(&at).map(|(c, &i)| &c[i]).collect();
    let sum = chosen.iter().fold(Sum { bytes: 0, cost: 0.0 }, |s, c| s.plus(c));
    Some(Solution { sum, picks: chosen.iter().map(|c| c.id).collect(), exact: false })
}

/// The fewest bytes that choices for all items take.
pub fn smallest(items: &Items) -> i64 {
    items.iter().map(|c| c.iter().map(|c| c.bytes).min().unwrap_or(0)).sum()
}

impl Sum {
    /// With one more offer taken.
    pub fn plus(&self, c: &Offer) -> Sum {
        Sum { bytes: self.bytes + c.bytes, cost: self.cost + c.cost }
    }
}

/// The choices that no other one beats in both: bytes grow, costs fall. Of equal ones the first stays.
fn undominated(choices: &[Offer]) -> Vec<Offer> {
    let mut sorted = choices.to_vec();
    sorted.sort_by(|a, b| a.bytes.cmp(&b.bytes).then(a.cost.total_cmp(&b.cost)));
    let mut out: Vec<Offer> = Vec::new();
    for c in sorted {
        if out.last().is_none_or(|last| c.cost < last.cost) {
            out.push(c);
        }
    }
    out
}

/// The undominated sums. `keep` makes, for the items after one, the test that a sum must pass to be kept.
fn sums<K: Fn(&Sum) -> bool>(items: &Items, max_sums: usize, keep: impl Fn(usize) -> K) -> Frontier {
    let limit = (max_sums / items.len().max(1)).max(2);
    let mut exact = true;
    let mut front = vec![Sum { bytes: 0, cost: 0.0 }];
    let mut all = Vec::with_capacity(items.len());
    for (i, choices) in items.iter().enumerate() {
        let (mut next, mut steps) = extended(&front, &undominated(choices), keep(i + 1));
        if next.len() > limit {
            exact = false;
            let kept = |i: usize| i * (next.len() - 1) / (limit - 1);
            steps = (0..limit).map(|i| steps[kept(i)]).collect();
            next = (0..limit).map(|i| next[kept(i)]).collect();
        }
        front = next;
        all.push(steps);
    }
    Frontier { points: front, exact, steps: all }
}

/// The undominated sums of a front with each of the choices: one merge of as many sorted lists.
fn extended(front: &[Sum], choices: &[Offer], keep: impl Fn(&Sum) -> bool) -> (Vec<Sum>, Vec<Step>) {
    let mut heads = vec![0usize; choices.len()];
    let (mut next, mut steps): (Vec<Sum>, Vec<Step>) = (Vec::new(), Vec::new());
    let earlier = |a: &Sum, b: &Sum| a.bytes.cmp(&b.bytes).then(a.cost.total_cmp(&b.cost)) == Ordering::Less;
    loop {
        let mut least: Option<(usize, Sum)> = None;
        for (c, choice) in choices.iter().enumerate() {
            let Some(head) = front.get(heads[c]) else { continue };
            let sum = head.plus(choice);
            if least.is_none_or(|(_, l)| earlier(&sum, &l)) {
                least = Some((c, sum));
            }
        }
        let Some((c, sum)) = least else { return (next, steps) };
        if next.last().is_none_or(|last| sum.cost < last.cost) && keep(&sum) {
            steps.push(Step { from: heads[c] as u32, id: choices[c].id as u32 });
            next.push(sum);
        }
        heads[c] += 1;
    }
}

/// The least cost within `budget`, by the sums that may still lead to something better than the greedy choice.
fn bounded(items: &Items, budget: i64, max_sums: usize) -> Option<Solution> {
    let known = greedy(items, budget)?;
    let relaxed = Relaxation::new(items);
    // Sums in another order may differ in their last digits.
    let most = known.sum.cost + known.sum.cost.abs() * 1e-12;
    let found = sums(items, max_sums, |from| {
        let rest = relaxed.of_rest(from);
        move |s: &Sum| rest.least_cost(budget - s.bytes).is_some_and(|least| s.cost + least <= most)
    });
    match found.within(budget) {
        Some(point) if found.points[point].cost <= known.sum.cost => Some(found.solution(point)),
        _ => Some(Solution { exact: found.exact, ..known }),
    }
}

/// The linear relaxation: parts of neighbouring choices may be mixed, so the steps of all items' convex hulls are taken
/// in the order of what they save for a byte.
struct Relaxation {
    /// Sums of the smallest choices of the items from each on.
    smallest: Vec<Sum>,
    /// Item, bytes and (negative) cost of each step, the best first.
    steps: Vec<(usize, Sum)>,
}

/// The relaxation of the items from one on: points of a convex function.
struct Rest(Vec<Sum>);

impl Relaxation {
    fn new(items: &Items) -> Relaxation {
        let mut smallest = vec![Sum { bytes: 0, cost: 0.0 }];
        let mut steps = Vec::new();
        for (i, choices) in items.iter().enumerate().rev() {
            let hull = hull(&undominated(choices));
            smallest.push(smallest[smallest.len() - 1].plus(&hull[0]));
            let step = |w: &[Offer]| (i, Sum { bytes: w[1].bytes - w[0].bytes, cost: w[1].cost - w[0].cost });
            steps.extend(hull.windows(2).map(step));
        }
        smallest.reverse();
        let slope = |s: &Sum| s.cost / s.bytes as f64;
        steps.sort_by(|a, b| slope(&a.1).total_cmp(&slope(&b.1)).then(a.0.cmp(&b.0)));
        Relaxation { smallest, steps }
    }

    fn of_rest(&self, from: usize) -> Rest {
        let mut points = vec![self.smallest[from]];
        for (_, step) in self.steps.iter().filter(|(item, _)| *item >= from) {
            let last = points[points.len() - 1];
            points.push(Sum { bytes: last.bytes + step.bytes, cost: last.cost + step.cost });
        }
        Rest(points)
    }
}

impl Rest {
    /// A lower bound of the cost within `budget` bytes; `None` when nothing fits.
    fn least_cost(&self, budget: i64) -> Option<f64> {
        let Rest(points) = self;
        let above = points.partition_point(|p| p.bytes <= budget);
        let a = points[above.checked_sub(1)?];
        Some(match points.get(above) {
            None => a.cost,
            Some(b) => {
                let share = (budget - a.bytes) as f64 / (b.bytes - a.bytes) as f64;
                a.cost + share * (b.cost - a.cost)
            }
        })
    }
}

/// The lower convex hull of undominated choices.
fn hull(choices: &[Offer]) -> Vec<Offer> {
    let mut out: Vec<Offer> = Vec::new();
    let above = |a: &Offer, b: &Offer, c: &Offer| {
        (b.cost - a.cost) * (c.bytes - b.bytes) as f64 >= (c.cost - b.cost) * (b.bytes - a.bytes) as f64
    };
    for c in choices {
        while let [.., a, b] = &out[..]
            && above(a, b, c)
        {
            out.pop();
        }
        out.push(*c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn item(choices: &[(i64, f64)]) -> Vec<Offer> {
        choices.iter().enumerate().map(|(id, &(bytes, cost))| Offer { id, bytes, cost }).collect()
    }

    /// Every combination: the least cost within the budget, and of those the fewest bytes.
    fn brute(items: &Items, budget: i64) -> Option<Sum> {
        let mut best: Option<Sum> = None;
        let combinations: usize = items.iter().map(Vec::len).product();
        for mut n in 0..combinations {
            let mut sum = Sum { bytes: 0, cost: 0.0 };
            for choices in items {
                sum = sum.plus(&choices[n % choices.len()]);
                n /= choices.len();
            }
            let better = |b: Sum| sum.cost < b.cost || sum.cost == b.cost && sum.bytes < b.bytes;
            if sum.bytes <= budget && best.is_none_or(better) {
                best = Some(sum);
            }
        }
        best
    }

    fn check(items: &Items, budget: i64) {
        let all = frontier(items);
        assert!(all.exact);
        assert!(all.points.is_sorted_by(|a, b| a.bytes < b.bytes && a.cost > b.cost));
        assert_eq!(all.points[0].bytes, smallest(items));
        let wanted = brute(items, budget);
        let found = solve(items, budget, &all);
        let direct = bounded(items, budget, MAX_SUMS);
        assert_eq!(found.as_ref().map(|s| s.sum), wanted);
        assert_eq!(direct.as_ref().map(|s| s.sum.cost), wanted.map(|s| s.cost));
        let greedy = greedy(items, budget);
        assert_eq!(greedy.is_some(), wanted.is_some());
        for s in [found, direct, greedy].into_iter().flatten() {
            let picked = s.picks.iter().zip(items).map(|(&id, choices)| choices[id]);
            let sum = picked.fold(Sum { bytes: 0, cost: 0.0 }, |s, c| s.plus(&c));
            assert_eq!(sum, s.sum);
            assert!(sum.bytes <= budget && sum.cost >= wanted.unwrap().cost);
        }
    }

    proptest! {
        /// Costs are whole numbers, so that sums in any order are the same. Bytes and costs tie often.
        #[test]
        fn equals_brute_force(
            items in prop::collection::vec(
                prop::collection::vec((-2i64..9, 0u8..9), 1..5), 1..7),
            budget in -5i64..40,
        ) {
            let items: Vec<_> = items.iter()
                .map(|i| item(&i.iter().map(|&(b, c)| (b, f64::from(c))).collect::<Vec<_>>())).collect();
            check(&items, budget);
        }
    }

    #[test]
    fn greedy_is_not_the_best() {
        // A step of 6 bytes saves 0.5 a byte, one of 10 bytes 0.49: greedy takes the first, and the other fits no more.
        let items = [item(&[(0, 10.0), (6, 7.0)]), item(&[(0, 10.0), (10, 5.1)])];
        let all = frontier(&items);
        let best = solve(&items, 10, &all).unwrap();
        assert_eq!((best.picks, best.sum.cost), (vec![0, 1], 15.1));
        assert_eq!(greedy(&items, 10).unwrap().picks, [1, 0]);
    }

    #[test]
    fn nothing_fits() {
        let items = [item(&[(3, 1.0), (5, 0.0)]), item(&[(4, 0.0)])];
        let all = frontier(&items);
        assert_eq!(smallest(&items), 7);
        assert_eq!(solve(&items, 6, &all), None);
        assert_eq!(bounded(&items, 6, MAX_SUMS), None);
        assert_eq!(greedy(&items, 6), None);
        assert_eq!(solve(&items, 7, &all).unwrap().picks, [0, 0]);
        assert_eq!(frontier(&[]).points, [Sum { bytes: 0, cost: 0.0 }]);
    }

    #[test]
    fn ties_are_settled_by_order() {
        let items = [item(&[(1, 1.0), (1, 1.0), (2, 1.0)]), item(&[(5, 0.0), (4, 0.0)])];
        assert_eq!(solve(&items, 100, &frontier(&items)).unwrap().picks, [0, 1]);
    }

    /// Sizes without anything in common, more sums than are kept: the frontier is thinned, and an answer for one budget
    /// is exact all the same, as a run that keeps all shows.
    #[test]
    fn a_thinned_frontier_says_so() {
        let mut x = 1u64;
        let mut random = |n: u64| {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (x >> 33) % n
        };
        let sizes = |r: &mut dyn FnMut(u64) -> u64| {
            let b = r(1000) as i64;
            item(&[(b, r(4000) as f64), (b + 500 + r(900) as i64, r(1500) as f64), (b + 2000, r(300) as f64)])
        };
        let items: Vec<_> = (0..24).map(|_| sizes(&mut random)).collect();
        let whole = frontier(&items);
        assert!(whole.exact && whole.points.len() > 150, "{}", whole.points.len());
        let thin = sums(&items, 24 * 100, |_| |_: &Sum| true);
        assert!(!thin.exact && thin.points.len() <= 100);
        assert_eq!(thin.points[0].bytes, whole.points[0].bytes);
        for budget in (thin.points[0].bytes..45_000).step_by(777) {
            let wanted = solve(&items, budget, &whole).unwrap();
            let found = bounded(&items, budget, 24 * 100).unwrap();
            assert!(found.exact, "{budget}");
            assert_eq!(found.sum.cost, wanted.sum.cost);
            // What was thinned is never better, and within the budget.
            let rough = thin.solution(thin.within(budget).unwrap());
            assert!(!rough.exact && rough.sum.cost >= wanted.sum.cost && rough.sum.bytes <= budget);
        }
        // Even with next to no memory there is an answer, and it says that it may not be the best.
        let poor = bounded(&items, 30_000, 24 * 2).unwrap();
        assert!(poor.sum.bytes <= 30_000);
    }
}

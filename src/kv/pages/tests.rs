//! Random histories of a page table, over memory that holds a number at each place.

use super::*;
use proptest::prelude::*;
use proptest::sample::Index;
use std::collections::HashMap;

#[derive(Clone, Debug)]
enum Event {
    Open,
    Close(Index),
    Extend(Index, usize),
    Truncate(Index, Index),
    Share(Index, Index),
    Grow(usize),
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let any = any::<Index>;
    let event = prop_oneof![
        2 => Just(Event::Open),
        1 => any().prop_map(Event::Close),
        6 => (any(), 0..9usize).prop_map(|(of, rows)| Event::Extend(of, rows)),
        2 => (any(), any()).prop_map(|(of, len)| Event::Truncate(of, len)),
        2 => (any(), any()).prop_map(|(of, len)| Event::Share(of, len)),
        1 => (0..3usize).prop_map(Event::Grow),
    ];
    prop::collection::vec(event, 0..40)
}

/// Each page is free, or counted once for each sequence that has it.
fn no_page_is_lost(table: &PageTable) {
    let mut users = vec![0; table.users.len()];
    for held in table.slots.iter().flatten() {
        assert_eq!(held.pages.len(), table.pages_for(held.len));
        held.pages.iter().for_each(|&page| users[page as usize] += 1);
    }
    assert_eq!(users, table.users);
    let mut free = table.free.clone();
    free.sort_unstable();
    let unused: Vec<u32> =
        (0..).zip(&users).filter(|(_, users)| **users == 0).map(|(page, _)| page).collect();
    assert_eq!(free, unused);
}

/// What `call` does to the table, which it leaves alone where it fails.
fn tried<R>(table: &mut PageTable, call: impl FnOnce(&mut PageTable) -> Result<R>) -> Result<R> {
    let before = format!("{table:?}");
    let result = call(table);
    if result.is_err() {
        assert_eq!(before, format!("{table:?}"));
    }
    result
}

proptest! {
    /// In memory that holds a number at each place, every sequence reads what it wrote.
    #[test]
    fn sequences_keep_what_is_theirs(
        events in events(), in_rows: bool, pages in 0..6usize, page_len in 1..5usize,
    ) {
        let mut table = PageTable::new(pages, page_len, in_rows).unwrap();
        let mut open: Vec<(SequenceId, Vec<usize>)> = Vec::new();
        let mut closed = Vec::new();
        let mut memory = HashMap::new();
        let mut written = 0;
        for event in events {
            let of = match &event {
                Event::Close(of) | Event::Extend(of, _) | Event::Truncate(of, _) | Event::Share(of, _)
                    if !open.is_empty() => of.index(open.len()),
                Event::Open | Event::Grow(_) => 0,
                _ => continue,
            };
            let free = table.free_pages();
            match event {
                Event::Open => match tried(&mut table, PageTable::open) {
                    Ok(id) => open.push((id, Vec::new())),
                    Err(error) => prop_assert!(
                        in_rows && matches!(error, Error::Pages { needed: 1, free: 0 }), "{error}"
                    ),
                },
                Event::Close(_) => {
                    let (id, _) = open.swap_remove(of);
                    table.close(id).unwrap();
                    closed.push(id);
                }
                Event::Extend(_, rows) => {
                    let (id, content) = &mut open[of];
                    match tried(&mut table, |table| {
                        let extension = table.extension(*id, rows)?;
                        let copy = extension.copy;
                        table.extend(extension);
                        Ok(copy)
                    }) {
                        Ok(copy) => {
                            if let Some(PageCopy { from, to, rows, .. }) = copy {
                                let at = |page: u32, row| page as usize * table.page_len + row;
                                for row in 0..rows {
                                    memory.insert(at(to, row), memory[&at(from, row)]);
                                }
                            }
                            let held = content.len();
                            content.extend(written..written + rows);
                            written += rows;
                            let places = table.places(*id, held..held + rows).unwrap();
                            for (place, &number) in places.zip(&content[held..]) {
                                memory.insert(place as usize, number);
                            }
                        }
                        Err(Error::Capacity { capacity, len, requested }) => {
                            prop_assert!(in_rows && len + requested > capacity);
                            prop_assert_eq!((capacity, len, requested), (table.page_len, content.len(), rows));
                        }
                        Err(Error::Pages { needed, free: left }) => {
                            prop_assert!(needed > left && left == free);
                            // A copy takes one page more than the rows do.
                            let more = (content.len() + rows).div_ceil(table.page_len);
                            let more = more - content.len().div_ceil(table.page_len);
                            prop_assert!(needed == more || needed == more + 1);
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
                Event::Truncate(_, len) => {
                    let (id, content) = &mut open[of];
                    let len = len.index(content.len() + 1);
                    content.truncate(len);
                    table.truncate(*id, len).unwrap();
                }
                Event::Share(_, len) => {
                    let (id, content) = &open[of];
                    let len = len.index(content.len() + 1);
                    let shared = (table.share(*id, len).unwrap(), content[..len].to_vec());
                    open.push(shared);
                    prop_assert_eq!(table.free_pages(), free);
                }
                Event::Grow(more) => {
                    let page_len = table.page_len + if in_rows { more } else { 0 };
                    let moved: HashMap<usize, usize> = memory
                        .drain()
                        .map(|(place, number)| {
                            (place / table.page_len * page_len + place % table.page_len, number)
                        })
                        .collect();
                    memory = moved;
                    table.grow(table.users.len() + more, page_len);
                    prop_assert_eq!(table.free_pages(), free + more);
                }
            }

            no_page_is_lost(&table);
            let used = table.used_rows();
            for (id, content) in &open {
                prop_assert_eq!(table.len(*id).unwrap(), content.len());
                let places: Vec<usize> =
                    table.places(*id, 0..content.len()).unwrap().map(|place| place as usize).collect();
                prop_assert!(places.iter().all(|place| place % table.page_len < used[place / table.page_len]));
                let read: Vec<usize> = places.iter().map(|place| memory[place]).collect();
                prop_assert_eq!(&read, content);
                let keys = table.keys(*id, content.len()).unwrap();
                let same: Vec<usize> = (0..keys.len())
                    .map(|key| keys.place(key, table.page_len))
                    .map(|(page, row)| page * table.page_len + row)
                    .collect();
                prop_assert_eq!(same, places);
            }
            for &id in &closed {
                prop_assert!(table.len(id).is_err() && table.close(id).is_err());
                prop_assert!(table.share(id, 0).is_err() && table.truncate(id, 0).is_err());
                prop_assert!(table.extension(id, 0).is_err() && table.keys(id, 0).is_err());
                prop_assert!(table.places(id, 0..0).is_err());
            }
        }
        open.iter().for_each(|(id, _)| table.close(*id).unwrap());
        prop_assert_eq!(table.free_pages(), table.users.len());
    }
}

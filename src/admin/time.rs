//! Times as people write them: RFC 3339 in UTC, and spans back from now.

use crate::idempotency::Millis;

const DAY_MS: u64 = 86_400_000;
/// 9999-12-31T23:59:59.999Z: RFC 3339 has four digits for the year.
const LATEST: u64 = 253_402_300_799_999;

/// RFC 3339 with milliseconds; what lies beyond the year 9999 is its end.
pub(super) fn format(time: Millis) -> String {
    let ms = time.0.min(LATEST);
    let (days, in_day) = (ms / DAY_MS, ms % DAY_MS);
    let (year, month, day) = civil(days);
    let (seconds, millis) = (in_day / 1000, in_day % 1000);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

/// The date of a day counted from 1970-01-01, in the proleptic Gregorian calendar: years begin in March here, so that the
/// leap day is the last one, and 400 of them (an era) have 146097 days.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468; // from 0000-03-01
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let months = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * months + 2) / 5 + 1;
    let month = if months < 10 { months + 3 } else { months - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

/// The inverse of [`civil`], for years from 1970 on.
fn days(year: u64, month: u64, day: u64) -> u64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, year_of_era) = (year / 400, year % 400);
    let day_of_year = (153 * if month > 2 { month - 3 } else { month + 9 } + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

/// A time in RFC 3339, from 1970 on, or a span back from `now` such as `90s`, `15m`, `2h` or `7d`.
pub(super) fn parse(text: &str, now: Millis) -> Option<Millis> {
    match span(text) {
        Some(ms) => Some(Millis(now.0.saturating_sub(ms))),
        None => rfc3339(text),
    }
}

fn span(text: &str) -> Option<u64> {
    let unit_at = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(unit_at);
    let factor = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => DAY_MS,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

/// Date, time, optional fraction (cut to milliseconds), `Z` or an offset. A leap second is the second after it.
fn rfc3339(text: &str) -> Option<Millis> {
    let mut rest = text;
    let year = number(&mut rest, 4)?;
    let month = number_after(&mut rest, "-")?;
    let day = number_after(&mut rest, "-")?;
    rest = rest.strip_prefix(['T', 't', ' '])?;
    let hour = number(&mut rest, 2)?;
    let minute = number_after(&mut rest, ":")?;
    let second = number_after(&mut rest, ":")?;
    let mut millis = 0;
    if let Some(fraction) = rest.strip_prefix('.') {
        let end = fraction.find(|c: char| !c.is_ascii_digit()).unwrap_or(fraction.len());
        let (digits, after) = fraction.split_at(end);
        let padded = digits.chars().chain("00".chars()).take(3).collect::<String>();
        millis = if digits.is_empty() { return None } else { padded.parse::<u64>().ok()? };
        rest = after;
    }
    let valid = year >= 1970 && hour < 24 && minute < 60 && second <= 60;
    if !valid || !(1..=12).contains(&month) || day == 0 || civil(days(year, month, day)) != (year, month, day) {
        return None;
    }
    let local = days(year, month, day) * DAY_MS + ((hour * 60 + minute) * 60 + second) * 1000 + millis;
    if matches!(rest, "Z" | "z") {
        return Some(Millis(local));
    }
    let east = rest.starts_with('+');
    rest = rest.strip_prefix(['+', '-'])?;
    let (hours, minutes) = (number(&mut rest, 2)?, number_after(&mut rest, ":")?);
    let offset = (hours * 60 + minutes) * 60_000;
    let utc = if east { local.checked_sub(offset)? } else { local + offset };
    (rest.is_empty() && hours < 24 && minutes < 60).then_some(Millis(utc))
}

fn number(rest: &mut &str, digits: usize) -> Option<u64> {
    let (number, after) = rest.split_at_checked(digits)?;
    *rest = after;
    number.bytes().all(|byte| byte.is_ascii_digit()).then(|| number.parse().ok())?
}

fn number_after(rest: &mut &str, sign: &str) -> Option<u64> {
    *rest = rest.strip_prefix(sign)?;
    number(rest, 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_and_read_back() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (951_868_799_999, "2000-02-29T23:59:59.999Z"),
            (1_709_164_800_000, "2024-02-29T00:00:00.000Z"),
            (1_735_689_599_000, "2024-12-31T23:59:59.000Z"),
            (1_735_689_600_001, "2025-01-01T00:00:00.001Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
            (LATEST, "9999-12-31T23:59:59.999Z"),
        ] {
            assert_eq!(format(Millis(ms)), text);
            assert_eq!(parse(text, Millis(0)), Some(Millis(ms)), "{text}");
        }
        assert_eq!(format(Millis(u64::MAX)), format(Millis(LATEST)));
        for day in (0..LATEST / DAY_MS).step_by(13) {
            let (year, month, date) = civil(day);
            assert_eq!(days(year, month, date), day);
        }
    }

    #[test]
    fn offsets_fractions_and_leap_seconds_are_understood() {
        let expected = Some(Millis(1_735_689_600_000));
        for text in [
            "2025-01-01T00:00:00Z",
            "2025-01-01t00:00:00z",
            "2025-01-01 00:00:00Z",
            "2025-01-01T01:30:00+01:30",
            "2024-12-31T19:00:00-05:00",
            "2024-12-31T23:59:60Z",
            "2025-01-01T00:00:00.0004Z",
        ] {
            assert_eq!(parse(text, Millis(0)), expected, "{text}");
        }
        assert_eq!(parse("2025-01-01T00:00:00.5Z", Millis(0)), Some(Millis(1_735_689_600_500)));
    }

    #[test]
    fn spans_count_back_from_now() {
        let now = Millis(10 * DAY_MS);
        for (text, ms) in [("1ms", 1), ("90s", 90_000), ("15m", 900_000), ("2h", 7_200_000), ("7d", 7 * DAY_MS)] {
            assert_eq!(parse(text, now), Some(Millis(now.0 - ms)), "{text}");
        }
        assert_eq!(parse("11d", now), Some(Millis(0)));
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for text in [
            "",
            "7",
            "d",
            "-7d",
            "7w",
            "7 d",
            "99999999999999999999d",
            "184467440737095516d",
            "2025-01-01",
            "now",
            "2025-02-29T00:00:00Z",
            "2025-13-01T00:00:00Z",
            "2025-00-01T00:00:00Z",
            "2025-01-00T00:00:00Z",
            "2025-01-01T24:00:00Z",
            "2025-01-01T00:60:00Z",
            "2025-01-01T00:00:61Z",
            "2025-01-01T00:00:00",
            "2025-01-01T00:00:00.Z",
            "2025-01-01T00:00:00+24:00",
            "2025-01-01T00:00:00+1:00",
            "1969-12-31T23:59:59Z",
            "2025-01-01T00:00:00Zx",
            "1970-01-01T00:00:00+00:01",
            "２０25-01-01T00:00:00Z",
            "+025-01-01T00:00:00Z",
        ] {
            assert_eq!(parse(text, Millis(0)), None, "{text}");
        }
    }
}

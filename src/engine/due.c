/*-------------------------------------------------------------------------
 *
 * due.c
 *		Which due rows a claim takes; fairness between teams.
 *
 * Rows are read in order of next_check_at, from the low-water mark on: index
 * entries of rows handled already stay behind while some transaction pins xmin,
 * and reading them anew on every claim would cost 100,000 buffers.  For the same reason the index is asked for the next row
 * ahead only once the last answer's time has come.  A team at its in-flight cap
 * is parked: the scan goes on past its rows without touching them and remembers
 * where the first one was; when the team has room again its rows are read from
 * there.  A row that a user has locked, or whose turn has raised an error, is
 * passed by.  All these marks are only hints: a commit below them lowers them
 * (wake.c), and a full pass every sweep_interval heals the rest, beside what
 * becomes due meanwhile.
 *
 * Where room is scarce, what is newly due and what is parked come first in turn,
 * and of parked teams that one which was served the longest ago: no number of
 * teams with a backlog keeps the others out.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "agentvm.h"
#include "catalog/pg_type.h"
#include "db.h"
#include "engine/engine_private.h"
#include "executor/instrument.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#define SCAN_CHUNK 600 /* rows or buffers that a claim reads, each of due, overlooked and parked */
#define JOINED_PER_TEAM 2000 /* sessions of a team that wait for calls for several at most */

static DbQuery scan_query = {"SELECT session_id, team_id, next_check_at FROM agentvm.session "
							 "WHERE lane = $1 AND next_check_at > $2 AND next_check_at <= $3 "
							 "ORDER BY next_check_at LIMIT $4",
							 4,
							 {INT2OID, TIMESTAMPTZOID, TIMESTAMPTZOID, INT4OID},
							 .generic = true};

/* The rows of one team among the next so many; the last of these in any case, so that the mark can move there. */
static DbQuery parked_query = {
	"SELECT session_id, team_id, next_check_at, n FROM ("
	"SELECT session_id, team_id, next_check_at, row_number() OVER (ORDER BY next_check_at) AS n "
	"FROM (SELECT session_id, team_id, next_check_at FROM agentvm.session "
	"WHERE lane = $1 AND next_check_at > $2 AND next_check_at <= $3 "
	"ORDER BY next_check_at LIMIT $4) i) o WHERE team_id = $5 OR n = $4 LIMIT $6",
	6,
	{INT2OID, TIMESTAMPTZOID, TIMESTAMPTZOID, INT4OID, TEXTOID, INT4OID}};

static DbQuery ahead_query = {
	"SELECT next_check_at FROM agentvm.session "
	"WHERE lane = $1 AND next_check_at > $2 ORDER BY next_check_at LIMIT 1",
	2,
	{INT2OID, TIMESTAMPTZOID}};

TeamLoad *
team_of(Engine *engine, const char *team_id)
{
	char key[AVM_MAX_ID + 1];
	TeamLoad *team;
	bool found;

	strlcpy(key, team_id, sizeof(key));
	team = hash_search(engine->teams, key, HASH_ENTER, &found);
	if (!found)
	{
		team->in_flight = 0;
		team->joined = 0;
		team->chosen = 0;
		team->parked_from = DT_NOEND;
		team->served = 0;
		team->slow_until = DT_NOBEGIN;
		team->slow_count = 0;
	}
	return team;
}

int
due_share(Engine *engine, int total)
{
	return total / engine->peers + (engine->rank < total % engine->peers ? 1 : 0);
}

static int
team_room(Engine *engine, TeamLoad *team, TimestampTz now)
{
	if (team->slow_until > now)
		return 0;
	return Min(due_share(engine, avm_max_in_flight_per_team) - team->in_flight,
			   JOINED_PER_TEAM - team->joined) -
		   team->chosen;
}

void
due_pass_by(Engine *engine, const pg_uuid_t *id, TimestampTz due, TimestampTz until)
{
	PassedBy *entry = hash_search(engine->passed_by, id, HASH_ENTER, NULL);

	entry->due = due;
	entry->until = until;
}

static bool
is_passed_by(Engine *engine, const pg_uuid_t *id, TimestampTz due)
{
	PassedBy *entry = hash_search(engine->passed_by, id, HASH_FIND, NULL);

	return entry != NULL && entry->due == due;
}

/*
 * Look again at what raised long enough ago, and at what a commit below
 * "lowest" may have unlocked; returns the lowest mark with these.  What lies
 * below all marks is looked at by nobody and need not be remembered.
 */
static TimestampTz
stop_passing_by(Engine *engine, TimestampTz lowest)
{
	TimestampTz now = GetCurrentTimestamp();
	TimestampTz floor = Min(engine->low, engine->behind);
	HASH_SEQ_STATUS scan;
	TeamLoad *team;
	PassedBy *entry;

	hash_seq_init(&scan, engine->teams);
	while ((team = hash_seq_search(&scan)) != NULL)
		floor = Min(floor, team->parked_from);
	hash_seq_init(&scan, engine->passed_by);
	while ((entry = hash_seq_search(&scan)) != NULL)
	{
		bool locked = entry->until == DT_NOEND;

		if (locked ? lowest <= entry->due : entry->until <= now)
			lowest = Min(lowest, entry->due);
		else if (!locked || entry->due > floor)
			continue;
		hash_search(engine->passed_by, &entry->session_id, HASH_REMOVE, NULL);
	}
	return lowest;
}

static void
choose(Candidates *chosen, TeamLoad *team, const pg_uuid_t *id, TimestampTz due)
{
	Job *job = &chosen->jobs[chosen->count++];

	memset(job, 0, sizeof(Job));
	job->session_id = *id;
	job->due = due;
	team->chosen++;
}

/* Choose rows of a parked team that has room again, reading no more than so many. */
static void
choose_parked_of(Engine *engine, TeamLoad *team, int room, int budget, Candidates *chosen,
				 TimestampTz now)
{
	int limit = room + 1 + Min(hash_get_num_entries(engine->passed_by), SCAN_CHUNK);
	TimestampTz last = team->parked_from;
	bool all = true; /* nothing is left after the rows read */
	Datum values[6];
	uint64 i;
	bool isnull;

	values[0] = Int16GetDatum(engine->lane);
	values[1] = TimestampTzGetDatum(team->parked_from);
	values[2] = TimestampTzGetDatum(now);
	values[3] = Int32GetDatum(budget);
	values[4] = CStringGetTextDatum(team->team_id);
	values[5] = Int32GetDatum(limit);
	db_run(&parked_query, values, NULL);
	for (i = 0; i < SPI_processed && room > 0; i++)
	{
		pg_uuid_t *id = DatumGetUUIDP(db_value(i, 1, &isnull));

		last = DatumGetTimestampTz(db_value(i, 3, &isnull));
		if (DatumGetInt64(db_value(i, 4, &isnull)) == budget)
			all = false;
		if (is_passed_by(engine, id, last) ||
			strcmp(db_text(i, 2, CurrentMemoryContext), team->team_id) != 0)
			continue;
		choose(chosen, team, id, last);
		room--;
	}
	/*
	 * Rows of the same microsecond may be left, so the next look begins at it and
	 * not after it, unless that were where this one began.
	 */
	if (all && SPI_processed < limit && room > 0)
		team->parked_from = DT_NOEND;
	else
		team->parked_from = last - 1 > team->parked_from || room == 0 ? last - 1 : last;
	SPI_freetuptable(SPI_tuptable);
}

static int
compare_served(const void *a, const void *b)
{
	uint64 x = (*(TeamLoad *const *) a)->served;
	uint64 y = (*(TeamLoad *const *) b)->served;

	return x < y ? -1 : x > y;
}

static int64
buffers_read(void)
{
	return pgBufferUsage.shared_blks_hit + pgBufferUsage.shared_blks_read;
}

/* Choose rows of parked teams that have room again, those first that have waited longest. */
static void
choose_parked(Engine *engine, Candidates *chosen, TimestampTz now)
{
	int64 until = buffers_read() + SCAN_CHUNK;
	TeamLoad **waiting = palloc(sizeof(TeamLoad *) * (hash_get_num_entries(engine->teams) + 1));
	HASH_SEQ_STATUS scan;
	TeamLoad *team;
	int count = 0;
	int i;

	hash_seq_init(&scan, engine->teams);
	while ((team = hash_seq_search(&scan)) != NULL)
	{
		if (team->parked_from != DT_NOEND && team_room(engine, team, now) > 0)
			waiting[count++] = team;
	}
	qsort(waiting, count, sizeof(TeamLoad *), compare_served);
	for (i = 0; i < count; i++)
	{
		int room = Min(team_room(engine, waiting[i], now), chosen->limit - chosen->count);
		int64 budget = until - buffers_read();

		if (room <= 0 || budget <= 0)
			break;
		waiting[i]->served = ++engine->looks;
		choose_parked_of(engine, waiting[i], room, (int) budget, chosen, now);
	}
}

/*
 * Choose from what is due after *from and up to "to", in order, parking teams
 * that have no room.  Moves *from; returns whether there is more.
 */
static bool
choose_between(Engine *engine, Candidates *chosen, TimestampTz *from, TimestampTz to,
			   TimestampTz now)
{
	Datum values[4];
	TimestampTz first = DT_NOEND;
	TimestampTz at = *from;
	bool more;
	uint64 i;

	if (chosen->count >= chosen->limit)
		return true;
	values[0] = Int16GetDatum(engine->lane);
	values[1] = TimestampTzGetDatum(*from);
	values[2] = TimestampTzGetDatum(to);
	values[3] = Int32GetDatum(SCAN_CHUNK);
	db_run(&scan_query, values, NULL);
	for (i = 0; i < SPI_processed; i++)
	{
		bool isnull;
		pg_uuid_t *id = DatumGetUUIDP(db_value(i, 1, &isnull));
		TeamLoad *team;

		at = DatumGetTimestampTz(db_value(i, 3, &isnull));
		first = Min(first, at);
		if (is_passed_by(engine, id, at))
			continue;
		team = team_of(engine, db_text(i, 2, CurrentMemoryContext));
		if (team->parked_from != DT_NOEND || team_room(engine, team, now) <= 0)
		{
			/* order within a team is kept: once parked, it is served from its own mark */
			team->parked_from = Min(team->parked_from, at - 1);
			continue;
		}
		if (chosen->count >= chosen->limit)
		{
			*from = at - 1;
			SPI_freetuptable(SPI_tuptable);
			return true;
		}
		choose(chosen, team, id, at);
	}
	more = SPI_processed >= SCAN_CHUNK;
	if (!more)
		*from = to;
	else /* look again at the last microsecond, which may go on, unless that were all we saw */
		*from = first < at ? at - 1 : at;
	SPI_freetuptable(SPI_tuptable);
	return more;
}

/* Choose from what is due above the low-water mark, then from what a pass over all finds below it. */
static void
choose_due(Engine *engine, Candidates *chosen, TimestampTz now)
{
	TimestampTz low = engine->low;

	engine->more = choose_between(engine, chosen, &engine->low, now, now);
	if (engine->behind == DT_NOEND)
		return;
	if (choose_between(engine, chosen, &engine->behind, low, now))
		engine->more = true;
	else
		engine->behind = DT_NOEND;
}

void
due_look_ahead(Engine *engine, TimestampTz now)
{
	Datum values[2];
	bool isnull;

	values[0] = Int16GetDatum(engine->lane);
	values[1] = TimestampTzGetDatum(now);
	db_run(&ahead_query, values, NULL);
	engine->next_due = SPI_processed > 0 ? DatumGetTimestampTz(db_value(0, 1, &isnull)) : DT_NOEND;
	SPI_freetuptable(SPI_tuptable);
}

void
due_begin(Engine *engine, TimestampTz lowest)
{
	HASH_SEQ_STATUS scan;
	TeamLoad *team;

	lowest = stop_passing_by(engine, lowest);
	if (lowest == DT_NOBEGIN)
		engine->behind = DT_NOBEGIN;
	else
		engine->low = Min(engine->low, lowest - 1);
	hash_seq_init(&scan, engine->teams);
	while ((team = hash_seq_search(&scan)) != NULL)
	{
		team->chosen = 0;
		if (team->parked_from != DT_NOEND && lowest <= team->parked_from)
			team->parked_from = lowest == DT_NOBEGIN ? lowest : lowest - 1;
		if (team->in_flight == 0 && team->joined == 0 && team->parked_from == DT_NOEND &&
			team->slow_until < GetCurrentTimestamp() && team->slow_count == 0)
			hash_search(engine->teams, team->team_id, HASH_REMOVE, NULL);
	}
}

/* Choose rows for a claim: what is newly due and what is parked come first in turn. */
void
due_choose(Engine *engine, Candidates *chosen, TimestampTz now)
{
	if (engine->due_first)
	{
		choose_due(engine, chosen, now);
		/* behind rows of parked teams there may be some of others: the room is kept for these */
		engine->due_first = engine->more && chosen->count == 0;
		if (!engine->due_first)
			choose_parked(engine, chosen, now);
	}
	else
	{
		choose_parked(engine, chosen, now);
		choose_due(engine, chosen, now);
		engine->due_first = true;
	}
}

TimestampTz
due_next(Engine *engine)
{
	TimestampTz next = DT_NOEND;
	HASH_SEQ_STATUS scan;
	TeamLoad *team;
	PassedBy *entry;

	hash_seq_init(&scan, engine->passed_by);
	while ((entry = hash_seq_search(&scan)) != NULL)
		next = Min(next, entry->until);
	hash_seq_init(&scan, engine->teams);
	while ((team = hash_seq_search(&scan)) != NULL)
	{
		if (team->parked_from == DT_NOEND)
			continue;
		team->chosen = 0;
		if (team_room(engine, team, GetCurrentTimestamp()) > 0)
			next = DT_NOBEGIN;
		else if (team->slow_until > GetCurrentTimestamp())
			next = Min(next, team->slow_until);
	}
	return next;
}

void
due_everything(Engine *engine)
{
	HASH_SEQ_STATUS scan;
	TeamLoad *team;

	engine->behind = DT_NOBEGIN;
	engine->next_due = DT_NOBEGIN;
	(void) stop_passing_by(engine, DT_NOBEGIN);
	hash_seq_init(&scan, engine->teams);
	while ((team = hash_seq_search(&scan)) != NULL)
	{
		/* still parked: only rows of others are to be found by going through all */
		if (team->parked_from != DT_NOEND)
			team->parked_from = DT_NOBEGIN;
	}
}

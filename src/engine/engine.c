/*-------------------------------------------------------------------------
 *
 * engine.c
 *		Claim, act, record: the one engine that dispatchers and CALL dispatch() run.
 *
 * Claim: a short transaction picks due sessions, locks those that nobody else
 * holds, gives each its turn (turn.c) and writes a fresh lease number for those
 * that need the network, together with the handle that makes the call
 * repeatable.  Act: after the commit the requests are sent; no transaction,
 * lock or snapshot is held while they are under way.  Record: another short
 * transaction locks the rows of answered calls again, drops the replies whose
 * lease number is no longer the row's, and gives the others their next turn.
 *
 * Which due rows to pick.  Rows are read in order of next_check_at, from the
 * low-water mark on: index entries of rows handled already stay behind while
 * some transaction pins xmin, and reading them anew on every claim would cost
 * 100,000 buffers.  A team at its in-flight cap is parked: the scan goes on past
 * its rows without touching them and remembers where the first one was; when the
 * team has room again its rows are read from there.  Both marks are only hints:
 * a commit below them lowers them (wake.c), and a full pass every
 * sweep_interval heals the rest.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "agentvm.h"
#include "catalog/pg_type.h"
#include "db.h"
#include "engine/engine.h"
#include "engine/retry.h"
#include "engine/turn.h"
#include "lib/ilist.h"
#include "net/http.h"
#include "utils/builtins.h"
#include "utils/hsearch.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#define SCAN_CHUNK 1000			 /* candidates read at once: under 2,000 buffers */
#define CHUNKS_PER_CLAIM 8		 /* then commit, and go on in the next claim */
#define RECORD_BATCH 128		 /* replies recorded in one transaction */
#define LOCKED_RETRY_US 100000	 /* how soon a record is tried again whose row a user has locked */
#define DEFAULT_TIMEOUT_MS 30000 /* of a call; never above two thirds of the lease */

/* A session whose call is under way, or answered and not yet recorded. */
typedef struct Act
{
	dlist_node node;
	MemoryContext context;
	pg_uuid_t session_id;
	int64 lease;
	char *team_id;
	char *provider;
	ProviderOp op;
	char *operation;
	bool mutates;
	HttpReply *reply;		/* NULL while under way */
	TimestampTz not_before; /* do not try to record earlier */
	int failures;			/* records that raised */
} Act;

/* A request of the batch that waits for the commit. */
typedef struct Outgoing
{
	Act *act;
	HttpRequest *request;
} Outgoing;

typedef struct TeamLoad
{
	char team_id[AVM_MAX_ID + 1]; /* hash key */
	int in_flight;
	int chosen;				 /* for the claim at hand */
	TimestampTz parked_from; /* its due rows begin after this; DT_NOEND: none are parked */
	TimestampTz slow_until;	 /* the provider throttles this team's account */
	int slow_count;
} TeamLoad;

struct Engine
{
	MemoryContext context;
	MemoryContext batch; /* of one transaction and the sends after it */
	MemoryContextCallback on_delete;
	HttpClient *http;
	DispatcherSlot *slot;
	EngineHost host;
	int lane;
	HTAB *teams;
	dlist_head under_way;
	dlist_head answered;
	int in_flight;
	TimestampTz low;	  /* low-water mark: nothing older is due that is not parked */
	TimestampTz next_due; /* the earliest next_check_at ahead, as last seen */
	bool more;			  /* more is due than the last claim took */
	int one_at_a_time;	  /* so many transactions are for one session only */
	bool have_suspect;	  /* the claim of "suspect" alone raised: put it off */
	pg_uuid_t suspect;
	uint64 recorded;
	List *outgoing; /* in batch */
	ConfigCache configs;
};

static DbQuery scan_query = {"SELECT session_id, team_id, next_check_at FROM agentvm.session "
							 "WHERE lane = $1 AND next_check_at > $2 AND next_check_at <= $3 "
							 "ORDER BY next_check_at LIMIT $4",
							 4,
							 {INT2OID, TIMESTAMPTZOID, TIMESTAMPTZOID, INT4OID}};

static DbQuery parked_query = {
	"SELECT session_id, team_id, next_check_at FROM agentvm.session "
	"WHERE lane = $1 AND next_check_at > $2 AND next_check_at <= $3 AND team_id = $5 "
	"ORDER BY next_check_at LIMIT $4",
	5,
	{INT2OID, TIMESTAMPTZOID, TIMESTAMPTZOID, INT4OID, TEXTOID}};

static DbQuery ahead_query = {
	"SELECT next_check_at FROM agentvm.session "
	"WHERE lane = $1 AND next_check_at > $2 ORDER BY next_check_at LIMIT 1",
	2,
	{INT2OID, TIMESTAMPTZOID}};

/*
 * Leases end within one lease time, so only the near end of the index is read.
 * A holder that is missing from pg_stat_activity is dead.
 */
static DbQuery reclaim_query = {
	"WITH dead AS MATERIALIZED (SELECT session_id FROM agentvm.session s "
	"WHERE lane = $1 AND next_check_at > $2 AND next_check_at <= $2 + $3 * interval '1 ms' "
	"AND lease IS NOT NULL AND NOT EXISTS (SELECT FROM pg_stat_get_activity(NULL) a "
	"WHERE a.pid = s.lease_pid AND a.backend_start = s.lease_start) "
	"FOR UPDATE SKIP LOCKED) "
	"UPDATE agentvm.session s SET lease = NULL, lease_pid = NULL, lease_start = NULL, "
	"next_check_at = clock_timestamp() FROM dead WHERE s.session_id = dead.session_id "
	"AND s.lease IS NOT NULL",
	3,
	{INT2OID, TIMESTAMPTZOID, INT4OID}};

static DbQuery postpone_query = {
	"UPDATE agentvm.session SET lease = NULL, next_check_at = clock_timestamp() + interval '60 s' "
	"WHERE session_id = (SELECT session_id FROM agentvm.session WHERE session_id = $1 "
	"FOR UPDATE SKIP LOCKED)",
	1,
	{UUIDOID}};

static void
close_http(void *arg)
{
	Engine *engine = arg;

	if (engine->http != NULL)
		http_client_destroy(engine->http);
	engine->http = NULL;
}

Engine *
engine_create(MemoryContext parent, DispatcherSlot *slot, EngineHost host)
{
	MemoryContext context = AllocSetContextCreate(parent, "agentvm engine", ALLOCSET_DEFAULT_SIZES);
	Engine *engine = MemoryContextAllocZero(context, sizeof(Engine));
	HASHCTL ctl = {0};

	engine->context = context;
	engine->batch = AllocSetContextCreate(context, "agentvm batch", ALLOCSET_DEFAULT_SIZES);
	engine->slot = slot;
	engine->host = host;
	engine->low = DT_NOBEGIN;
	engine->next_due = DT_NOEND;
	dlist_init(&engine->under_way);
	dlist_init(&engine->answered);
	ctl.keysize = AVM_MAX_ID + 1;
	ctl.entrysize = sizeof(TeamLoad);
	ctl.hcxt = context;
	engine->teams = hash_create("agentvm teams", 64, &ctl, HASH_ELEM | HASH_STRINGS | HASH_CONTEXT);
	engine->http = http_client_create();
	engine->on_delete.func = close_http;
	engine->on_delete.arg = engine;
	MemoryContextRegisterResetCallback(context, &engine->on_delete);
	return engine;
}

void
engine_destroy(Engine *engine)
{
	MemoryContextDelete(engine->context);
}

int
engine_fd(Engine *engine)
{
	return http_client_fd(engine->http);
}

int
engine_in_flight(Engine *engine)
{
	return engine->in_flight;
}

uint64
engine_recorded(Engine *engine)
{
	return engine->recorded;
}

/* ---- transactions ---- */

/*
 * What the planner may not use in the engine.  The price of a scan type that is
 * off makes any plan look dear enough for just-in-time compilation, so that has
 * to be off, too.
 */
static const char *const planner_off[] = {"enable_seqscan", "enable_bitmapscan", "enable_sort",
										  "jit"};

/*
 * Begin a transaction as the extension's owner.  Left alone the planner takes a
 * bitmap scan and a sort for a claim with many rows due, at 200 times the
 * buffers, and a bitmap scan never lets dead index entries be cleaned.
 */
static void
begin_batch(Engine *engine, DbScope *scope)
{
	int i;

	engine->host.begin();
	db_enter(scope);
	/* what is committed before a call must survive a crash after it */
	if (synchronous_commit == SYNCHRONOUS_COMMIT_OFF)
		(void) set_config_option("synchronous_commit", "local", PGC_USERSET, PGC_S_SESSION,
								 GUC_ACTION_SAVE, true, 0, false);
	for (i = 0; i < lengthof(planner_off); i++)
		(void) set_config_option(planner_off[i], "off", PGC_USERSET, PGC_S_SESSION, GUC_ACTION_SAVE,
								 true, 0, false);
	MemoryContextReset(engine->batch);
	engine->outgoing = NIL;
	engine->configs.context = engine->batch;
	engine->configs.entries = NIL;
	MemoryContextSwitchTo(engine->batch);
}

static void release_act(Engine *engine, Act *act);

/* Commit, then send what was waiting for that. */
static void
commit_batch(Engine *engine, DbScope *scope)
{
	ListCell *lc;

	db_leave(scope);
	engine->host.commit();
	MemoryContextSwitchTo(engine->batch);

	foreach (lc, engine->outgoing)
	{
		Outgoing *out = lfirst(lc);
		HttpRequest *request = out->request;
		Act *act = out->act;

		if (request->timeout_ms <= 0)
			request->timeout_ms = DEFAULT_TIMEOUT_MS;
		request->timeout_ms = Min(request->timeout_ms, avm_lease_ms * 2 / 3);
		PG_TRY();
		{
			http_start(engine->http, request, act);
			dlist_push_tail(&engine->under_way, &act->node);
		}
		PG_CATCH();
		{
			/* a request that may not be sent (plain http, say) is answered by that */
			ErrorData *error;

			MemoryContextSwitchTo(act->context);
			error = CopyErrorData();
			FlushErrorState();
			act->reply = palloc0(sizeof(HttpReply));
			act->reply->error = error->message;
			act->reply->body = "";
			act->reply->retry_after_s = -1;
			dlist_push_tail(&engine->answered, &act->node);
			MemoryContextSwitchTo(engine->batch);
		}
		PG_END_TRY();
	}
	engine->outgoing = NIL;
	MemoryContextSwitchTo(engine->context);
	MemoryContextReset(engine->batch);
	if (engine->slot != NULL)
		engine->slot->in_flight = engine->in_flight;
}

/* ---- acts and teams ---- */

static TeamLoad *
team_load(Engine *engine, const char *team_id)
{
	char key[AVM_MAX_ID + 1];
	TeamLoad *team;
	bool found;

	strlcpy(key, team_id, sizeof(key));
	team = hash_search(engine->teams, key, HASH_ENTER, &found);
	if (!found)
	{
		team->in_flight = 0;
		team->chosen = 0;
		team->parked_from = DT_NOEND;
		team->slow_until = DT_NOBEGIN;
		team->slow_count = 0;
	}
	return team;
}

static void
release_act(Engine *engine, Act *act)
{
	team_load(engine, act->team_id)->in_flight--;
	engine->in_flight--;
	MemoryContextDelete(act->context);
}

/* An act for a row whose turn asked for a request. */
static Act *
make_act(Engine *engine, const SessionRow *row)
{
	MemoryContext context =
		AllocSetContextCreate(engine->context, "agentvm act", ALLOCSET_SMALL_SIZES);
	Act *act = MemoryContextAllocZero(context, sizeof(Act));

	act->context = context;
	act->session_id = row->session_id;
	act->team_id = MemoryContextStrdup(context, row->team_id);
	act->provider = MemoryContextStrdup(context, row->provider);
	team_load(engine, act->team_id)->in_flight++;
	engine->in_flight++;
	return act;
}

/* A lease number that nobody has had. */
static int64
fresh_lease(void)
{
	uint64 bits;

	do
	{
		if (!pg_strong_random(&bits, sizeof(bits)))
			elog(ERROR, "could not generate a lease number");
		bits &= PG_INT64_MAX;
	} while (bits == 0);
	return (int64) bits;
}

/*
 * Throttling answers slow this team's account only: its next claims wait, twice
 * as long each time, until an answer is of another kind.
 */
static void
note_throttling(Engine *engine, const char *team_id, ErrorClass class)
{
	TeamLoad *team = team_load(engine, team_id);

	if (class != CLASS_THROTTLED)
	{
		team->slow_count = 0;
		return;
	}
	if (team->slow_until > GetCurrentTimestamp())
		return; /* calls that were under way already */
	team->slow_count++;
	team->slow_until = GetCurrentTimestamp() +
					   retry_delay_ms(team->slow_count, RETRY_CAP_LAUNCH_MS) * INT64CONST(1000);
}

/* Give a locked row its turn and save it; "act" is NULL for a row just claimed. */
static void
take_turn(Engine *engine, SessionRow *row, Act *act)
{
	TurnResult result;

	session_turn(row, act ? act->reply : NULL, act ? act->op : OP_PROVISION,
				 act ? act->operation : NULL, act ? act->mutates : false, &engine->configs,
				 &result);
	if (act != NULL)
		note_throttling(engine, act->team_id, result.last_class);

	if (result.request != NULL)
	{
		Outgoing *out = palloc(sizeof(Outgoing));

		if (act == NULL)
		{
			act = make_act(engine, row);
			act->lease = fresh_lease();
		}
		else
			dlist_delete(&act->node);
		row->lease = act->lease;
		row->next_check_at = GetCurrentTimestamp() + avm_lease_ms * INT64CONST(1000);
		act->op = result.op;
		act->operation =
			MemoryContextStrdup(act->context, result.operation ? result.operation : "call");
		act->mutates = result.mutates;
		act->reply = NULL;
		out->act = act;
		out->request = result.request;
		engine->outgoing = lappend(engine->outgoing, out);
	}
	else
	{
		row->lease = 0;
		engine->recorded++;
		if (engine->slot != NULL)
			engine->slot->recorded++;
		if (act != NULL)
		{
			dlist_delete(&act->node);
			release_act(engine, act);
		}
	}
	session_row_save(row);
}

/* ---- claim ---- */

static int
team_room(Engine *engine, TeamLoad *team, TimestampTz now)
{
	int cap = engine->slot ? Max(1, avm_max_in_flight_per_team / Max(1, avm_dispatchers))
						   : avm_max_in_flight_per_team;

	if (team->slow_until > now)
		return 0;
	return cap - team->in_flight - team->chosen;
}

typedef struct Candidates
{
	pg_uuid_t *ids;
	int count;
	int limit;
} Candidates;

/* Choose rows of parked teams that have room again, a fair share each. */
static void
choose_parked(Engine *engine, Candidates *chosen, TimestampTz now)
{
	HASH_SEQ_STATUS scan;
	TeamLoad *team;

	hash_seq_init(&scan, engine->teams);
	while ((team = hash_seq_search(&scan)) != NULL)
	{
		Datum values[5];
		int room = Min(team_room(engine, team, now), chosen->limit - chosen->count);
		TimestampTz last;
		uint64 i;
		bool isnull;

		if (team->parked_from == DT_NOEND || room <= 0)
			continue;
		values[0] = Int16GetDatum(engine->lane);
		values[1] = TimestampTzGetDatum(team->parked_from);
		values[2] = TimestampTzGetDatum(now);
		values[3] = Int32GetDatum(room);
		values[4] = CStringGetTextDatum(team->team_id);
		db_run(&parked_query, values, NULL);
		last = team->parked_from;
		for (i = 0; i < SPI_processed; i++)
		{
			chosen->ids[chosen->count++] = *DatumGetUUIDP(db_value(i, 1, &isnull));
			team->chosen++;
			last = DatumGetTimestampTz(db_value(i, 3, &isnull));
		}
		/*
		 * Rows of the same microsecond may be left, so the next look begins at
		 * it and not after it; but if that is where this one began, what we
		 * found is locked by somebody.
		 */
		if (SPI_processed < room)
			team->parked_from = DT_NOEND;
		else
			team->parked_from = last - 1 > team->parked_from ? last - 1 : last;
		SPI_freetuptable(SPI_tuptable);
	}
}

/* Choose from all that is due above the low-water mark, in order, parking teams that have no room. */
static void
choose_due(Engine *engine, Candidates *chosen, TimestampTz now)
{
	int chunk;

	engine->more = true;
	for (chunk = 0; chunk < CHUNKS_PER_CLAIM; chunk++)
	{
		Datum values[4];
		TimestampTz first = DT_NOEND;
		TimestampTz at = engine->low;
		uint64 found;
		uint64 i;

		values[0] = Int16GetDatum(engine->lane);
		values[1] = TimestampTzGetDatum(engine->low);
		values[2] = TimestampTzGetDatum(now);
		values[3] = Int32GetDatum(SCAN_CHUNK);
		db_run(&scan_query, values, NULL);
		found = SPI_processed;
		for (i = 0; i < found; i++)
		{
			bool isnull;
			TeamLoad *team;

			at = DatumGetTimestampTz(db_value(i, 3, &isnull));
			first = Min(first, at);
			team = team_load(engine, db_text(i, 2, CurrentMemoryContext));
			if (team->parked_from != DT_NOEND || team_room(engine, team, now) <= 0)
			{
				/* order within a team is kept: once parked, it is served from its own mark */
				team->parked_from = Min(team->parked_from, at - 1);
				continue;
			}
			if (chosen->count >= chosen->limit)
			{
				engine->low = at - 1;
				SPI_freetuptable(SPI_tuptable);
				return;
			}
			chosen->ids[chosen->count++] = *DatumGetUUIDP(db_value(i, 1, &isnull));
			team->chosen++;
		}
		SPI_freetuptable(SPI_tuptable);
		if (found < SCAN_CHUNK)
		{
			engine->low = now;
			engine->more = false;
			return;
		}
		/* look again at the last microsecond, which may go on, unless that were all we saw */
		engine->low = first < at ? at - 1 : at;
	}
}

/* When the next row is due, so that we know how long to sleep. */
static void
look_ahead(Engine *engine, TimestampTz now)
{
	Datum values[2];
	bool isnull;

	values[0] = Int16GetDatum(engine->lane);
	values[1] = TimestampTzGetDatum(now);
	db_run(&ahead_query, values, NULL);
	engine->next_due = SPI_processed > 0 ? DatumGetTimestampTz(db_value(0, 1, &isnull)) : DT_NOEND;
	SPI_freetuptable(SPI_tuptable);
}

/* Forget what was chosen in the last claim, and teams that need not be remembered. */
static void
begin_choosing(Engine *engine, TimestampTz lowest)
{
	HASH_SEQ_STATUS scan;
	TeamLoad *team;

	engine->low = Min(engine->low, lowest == DT_NOBEGIN ? lowest : lowest - 1);
	hash_seq_init(&scan, engine->teams);
	while ((team = hash_seq_search(&scan)) != NULL)
	{
		team->chosen = 0;
		if (team->parked_from != DT_NOEND && lowest <= team->parked_from)
			team->parked_from = lowest == DT_NOBEGIN ? lowest : lowest - 1;
		if (team->in_flight == 0 && team->parked_from == DT_NOEND &&
			team->slow_until < GetCurrentTimestamp() && team->slow_count == 0)
			hash_search(engine->teams, team->team_id, HASH_REMOVE, NULL);
	}
}

int
engine_claim(Engine *engine, int limit)
{
	DbScope scope;
	Candidates chosen = {0};
	TimestampTz now;
	TimestampTz lowest = DT_NOEND;
	int claimed = 0;
	int room = engine->slot ? Max(1, avm_max_in_flight / Max(1, avm_dispatchers)) : limit;

	room -= engine->in_flight;
	chosen.limit = Min(Min(limit, avm_batch_size), room);
	if (engine->one_at_a_time > 0)
	{
		engine->one_at_a_time--;
		chosen.limit = Min(chosen.limit, 1);
	}
	if (chosen.limit <= 0)
	{
		engine->more = false; /* the next record makes room, and asks again */
		return 0;
	}

	/* before our snapshot: whoever commits after it lowers the mark for the next claim */
	if (engine->slot != NULL)
		lowest = shared_take_due(engine->slot);
	else
		engine_look_at_everything(engine);
	begin_choosing(engine, lowest);

	begin_batch(engine, &scope);
	if (engine->have_suspect)
	{
		Datum values[1] = {UUIDPGetDatum(&engine->suspect)};

		engine->have_suspect = false;
		db_run(&postpone_query, values, NULL);
	}
	now = GetCurrentTimestamp();
	chosen.ids = palloc(sizeof(pg_uuid_t) * chosen.limit);
	choose_parked(engine, &chosen, now);
	if (chosen.count < chosen.limit)
		choose_due(engine, &chosen, now);
	else
		engine->more = true;
	if (chosen.count > 0)
	{
		List *rows;
		ListCell *lc;

		engine->have_suspect = chosen.count == 1;
		engine->suspect = chosen.ids[0];
		rows = session_rows_lock(chosen.ids, chosen.count, now);
		foreach (lc, rows)
			take_turn(engine, lfirst(lc), NULL);
		claimed = list_length(rows);
		if (engine->slot != NULL)
			engine->slot->claimed += claimed;
	}
	look_ahead(engine, now);
	commit_batch(engine, &scope);
	engine->have_suspect = false;
	return claimed;
}

/* ---- record ---- */

static void
record(Engine *engine, Act **acts, int count)
{
	DbScope scope;
	pg_uuid_t *ids;
	List *rows;
	ListCell *lc;
	int i;

	begin_batch(engine, &scope);
	ids = palloc(sizeof(pg_uuid_t) * count);
	for (i = 0; i < count; i++)
		ids[i] = acts[i]->session_id;
	rows = session_rows_lock(ids, count, DT_NOEND);
	foreach (lc, rows)
	{
		SessionRow *row = lfirst(lc);

		for (i = 0; i < count; i++)
		{
			if (acts[i] != NULL && acts[i]->lease == row->lease &&
				memcmp(&acts[i]->session_id, &row->session_id, sizeof(pg_uuid_t)) == 0)
			{
				take_turn(engine, row, acts[i]);
				acts[i] = NULL;
				break;
			}
		}
	}

	/* What is left was locked by somebody, or has a newer lease, or is gone. */
	for (i = 0; i < count; i++)
	{
		Act *act = acts[i];

		if (act == NULL)
			continue;
		if (session_row_lease(&act->session_id) == act->lease)
		{
			act->not_before = GetCurrentTimestamp() + LOCKED_RETRY_US;
			continue;
		}
		if (engine->slot != NULL)
			engine->slot->stale_replies++;
		dlist_delete(&act->node);
		release_act(engine, act);
	}
	commit_batch(engine, &scope);
}

void
engine_run(Engine *engine)
{
	HttpReply *reply;
	void *arg;

	http_run(engine->http);
	for (;;)
	{
		MemoryContext old = MemoryContextSwitchTo(engine->batch);
		Act *act;

		reply = http_finished(engine->http, &arg);
		MemoryContextSwitchTo(old);
		if (reply == NULL)
			break;
		act = arg;
		/* keep the reply with its act */
		old = MemoryContextSwitchTo(act->context);
		act->reply = palloc(sizeof(HttpReply));
		*act->reply = *reply;
		act->reply->body = pnstrdup(reply->body, reply->body_len);
		act->reply->error = reply->error ? pstrdup(reply->error) : NULL;
		act->reply->request_id = reply->request_id ? pstrdup(reply->request_id) : NULL;
		MemoryContextSwitchTo(old);
		dlist_delete(&act->node);
		dlist_push_tail(&engine->answered, &act->node);
	}

	for (;;)
	{
		Act *batch[RECORD_BATCH];
		int limit = engine->one_at_a_time > 0 ? 1 : RECORD_BATCH;
		int count = 0;
		TimestampTz now = GetCurrentTimestamp();
		dlist_iter iter;

		dlist_foreach(iter, &engine->answered)
		{
			Act *act = dlist_container(Act, node, iter.cur);

			if (act->not_before <= now && count < limit)
				batch[count++] = act;
		}
		if (count == 0)
			break;
		if (engine->one_at_a_time > 0)
			engine->one_at_a_time--;
		record(engine, batch, count);
	}
}

TimestampTz
engine_next_look(Engine *engine)
{
	TimestampTz next = engine->next_due;
	HASH_SEQ_STATUS scan;
	TeamLoad *team;
	dlist_iter iter;

	if (engine->more)
		return DT_NOBEGIN;
	dlist_foreach(iter, &engine->answered) next =
		Min(next, dlist_container(Act, node, iter.cur)->not_before);
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
engine_look_at_everything(Engine *engine)
{
	HASH_SEQ_STATUS scan;
	TeamLoad *team;

	engine->low = DT_NOBEGIN;
	hash_seq_init(&scan, engine->teams);
	while ((team = hash_seq_search(&scan)) != NULL)
		team->parked_from = DT_NOEND;
}

int
engine_reclaim(Engine *engine)
{
	DbScope scope;
	Datum values[3];
	int freed;

	begin_batch(engine, &scope);
	values[0] = Int16GetDatum(engine->lane);
	values[1] = TimestampTzGetDatum(GetCurrentTimestamp());
	values[2] = Int32GetDatum(avm_lease_ms);
	db_run(&reclaim_query, values, NULL);
	freed = SPI_processed;
	commit_batch(engine, &scope);
	return freed;
}

void
engine_after_error(Engine *engine)
{
	dlist_mutable_iter iter;

	/* acts whose requests were waiting for the commit that failed */
	ListCell *lc;

	foreach (lc, engine->outgoing)
	{
		Outgoing *out = lfirst(lc);

		/* its lease was rolled back, or will run out: nothing was sent */
		release_act(engine, out->act);
	}
	engine->outgoing = NIL;
	MemoryContextSwitchTo(engine->context);
	MemoryContextReset(engine->batch);

	dlist_foreach_modify(iter, &engine->answered)
	{
		Act *act = dlist_container(Act, node, iter.cur);

		act->not_before = GetCurrentTimestamp() + LOCKED_RETRY_US;
		if (engine->one_at_a_time > 0 && ++act->failures >= 3)
		{
			dlist_delete(&act->node);
			release_act(engine, act);
		}
	}
	engine->low = DT_NOBEGIN;
	engine->one_at_a_time = 64;
}

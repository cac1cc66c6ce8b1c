/*-------------------------------------------------------------------------
 *
 * quarantine.c
 *		What an administrator decides about VMs without a session: adopt_vm(), end_vm(),
 *		release_quarantine().
 *
 * Each locks the rows of agentvm.inventory that it is about, for as long as
 * the caller's transaction lasts: lists of those places wait till then.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "agentvm.h"
#include "catalog/pg_type.h"
#include "db.h"
#include "engine/identity.h"
#include "engine/session_row.h"
#include "engine/shared.h"
#include "engine/wake.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(agentvm_end_vm);
PG_FUNCTION_INFO_V1(agentvm_adopt_vm);
PG_FUNCTION_INFO_V1(agentvm_release_quarantine);

/* In one order, so that two of us cannot wait for each other. */
static DbQuery lock_query = {
	"SELECT FROM agentvm.inventory i WHERE $1 IS NULL AND EXISTS (SELECT FROM agentvm.vm_drift d "
	"WHERE d.account = i.account AND d.provider = i.provider AND d.region = i.region "
	"AND d.quarantined) OR EXISTS (SELECT FROM agentvm.vm_drift d WHERE d.account = i.account "
	"AND d.provider = i.provider AND d.region = i.region AND d.vm_id = $1) "
	"ORDER BY account, provider, region FOR UPDATE",
	1,
	{TEXTOID}};

/* A list under way may have passed what it is about: it is given up, and another one begun. */
static DbQuery due_query = {
	"UPDATE agentvm.inventory i SET next_at = clock_timestamp(), lease = NULL "
	"FROM agentvm.vm_drift d WHERE d.account = i.account AND d.provider = i.provider "
	"AND d.region = i.region AND d.vm_id = $1",
	1,
	{TEXTOID}};

static DbQuery end_query = {"UPDATE agentvm.vm_drift SET end_wanted = true WHERE vm_id = $1 "
							"AND kind IN ('orphan', 'unknown') RETURNING session_id, team_id",
							1,
							{TEXTOID}};

static DbQuery unknown_query = {
	"SELECT d.account, d.provider, d.region, d.session_id, d.kind, d.vm_state, "
	"d.detail IS NULL, t.team_id IS NOT NULL, f.team_id IS NOT NULL FROM agentvm.vm_drift d "
	"LEFT JOIN agentvm.team t ON t.team_id = d.team_id "
	"LEFT JOIN agentvm.provider_config f ON f.team_id = d.team_id AND f.provider = d.provider "
	"WHERE d.vm_id = $1 AND d.kind IN ('orphan', 'unknown')",
	1,
	{TEXTOID}};

static DbQuery adopt_query = {
	"WITH d AS (DELETE FROM agentvm.vm_drift WHERE account = $1 AND provider = $2 "
	"AND region = $3 AND vm_id = $4 AND kind = 'unknown' RETURNING *) "
	"INSERT INTO agentvm.session (session_id, team_id, agent_id, provider, state, detail, vm_id, "
	"region, address, purchase, created_at, launched_at, ready_at, deadline_at, ceiling_at, "
	"created_by, options, runtime, running, next_check_at) "
	"SELECT d.session_id, t.team_id, d.agent_id, d.provider, 'ready', "
	"'adopted by ' || $5, d.vm_id, d.region, d.address, "
	"CASE WHEN d.purchase = 'spot' THEN 'spot' ELSE 'on-demand' END, "
	"coalesce(d.launched_at, d.first_seen_at), coalesce(d.launched_at, d.first_seen_at), "
	"clock_timestamp(), clock_timestamp() + $6 * interval '1 s', "
	"clock_timestamp() + $7 * interval '1 s', $5, c.options, false, true, "
	"clock_timestamp() + $6 * interval '1 s' "
	"FROM d JOIN agentvm.team t ON t.team_id = d.account "
	"JOIN agentvm.provider_config c ON c.team_id = t.team_id AND c.provider = d.provider "
	"RETURNING session_id, team_id, next_check_at",
	7,
	{TEXTOID, TEXTOID, TEXTOID, TEXTOID, NAMEOID, INT4OID, INT4OID}};

static DbQuery release_query = {
	"UPDATE agentvm.vm_drift SET quarantined = false WHERE quarantined", 0, {0}};

static DbQuery all_due_query = {
	"UPDATE agentvm.inventory SET next_at = clock_timestamp(), lease = NULL "
	"WHERE (account, provider, region) IN (SELECT account, provider, region "
	"FROM agentvm.vm_drift WHERE kind IN ('orphan', 'unknown'))",
	0,
	{0}};

static DbQuery over_query = {
	"UPDATE agentvm.installation SET quarantined_since = NULL WHERE quarantined_since IS NOT NULL",
	0,
	{0}};

/* The argument, with the place of the VM locked. */
static Datum
lock_vm(FunctionCallInfo fcinfo)
{
	Datum values[1];

	if (PG_ARGISNULL(0))
		ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("vm_id must not be null")));
	values[0] = CStringGetTextDatum(check_identifier(PG_GETARG_TEXT_PP(0), "vm_id"));
	db_run(&lock_query, values, NULL);
	return values[0];
}

Datum
agentvm_end_vm(PG_FUNCTION_ARGS)
{
	DbScope scope;
	Datum values[1];
	bool found;

	require_admin("end a VM");
	if (!identity_permits("agentvm.end_vm()"))
		PG_RETURN_BOOL(false);
	db_enter(&scope);
	values[0] = lock_vm(fcinfo);
	db_run(&end_query, values, NULL);
	found = SPI_processed > 0;
	if (found)
	{
		db_run(&due_query, values, NULL);
		wake_workers(LANE_ALL, GetCurrentTimestamp());
	}
	db_leave(&scope);
	PG_RETURN_BOOL(found);
}

pg_noreturn static void
raise_not_adopted(const char *vm_id, const char *why)
{
	ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
					errmsg("VM \"%s\" cannot be adopted", vm_id), errdetail("%s", why),
					errhint("End it with agentvm.end_vm().")));
	pg_unreachable();
}

/*
 * Its runtime, if it has one, has a token that only it and the lost row knew: to the
 * gateway it is a stranger, and powers itself off after its deadman's allowance.  So the
 * row has none, and expects no heartbeat: it stands for the VM until its deadline.
 */
Datum
agentvm_adopt_vm(PG_FUNCTION_ARGS)
{
	Name role = palloc0(sizeof(NameData));
	pg_uuid_t *id = palloc(sizeof(pg_uuid_t));
	char *vm_id;
	char *team_id;
	DbScope scope;
	Datum values[7];
	bool isnull;

	namestrcpy(role, GetUserNameFromId(GetUserId(), false));
	require_admin("adopt a VM");
	(void) identity_permits("agentvm.adopt_vm()");
	db_enter(&scope);
	values[0] = lock_vm(fcinfo);
	vm_id = TextDatumGetCString(values[0]);
	db_run(&unknown_query, values, NULL);
	if (SPI_processed == 0)
		ereport(ERROR, (errcode(ERRCODE_UNDEFINED_OBJECT),
						errmsg("no VM \"%s\" without a session is known", vm_id),
						errhint("View agentvm.drift has those of the last list; "
								"agentvm.sweep_inventory() makes another one.")));
	(void) db_value(0, 4, &isnull);
	if (strcmp(db_text(0, 5, CurrentMemoryContext), "unknown") != 0)
		raise_not_adopted(vm_id, "Its session has ended, or has another VM.");
	if (isnull)
		raise_not_adopted(vm_id, "Its tags name no session.");
	if (strcmp(db_text(0, 6, CurrentMemoryContext), "running") != 0)
		raise_not_adopted(vm_id, "It does not run.");
	if (db_text(0, 1, CurrentMemoryContext)[0] == '\0')
		raise_not_adopted(vm_id, "It is on a host of ours.");
	if (!DatumGetBool(db_value(0, 7, &isnull)))
		raise_not_adopted(vm_id, "Its tags name another team than the one whose account it is in.");
	if (!DatumGetBool(db_value(0, 8, &isnull)) || !DatumGetBool(db_value(0, 9, &isnull)))
		raise_not_adopted(vm_id, "There is no team any more with this provider.");
	values[3] = values[0];
	for (int i = 0; i < 3; i++)
		values[i] = CStringGetTextDatum(db_text(0, i + 1, CurrentMemoryContext));
	values[4] = NameGetDatum(role);
	values[5] = Int32GetDatum(Min(avm_max_lifetime_s, avm_max_lifetime_ceiling_s));
	values[6] = Int32GetDatum(avm_max_lifetime_ceiling_s);
	db_run(&adopt_query, values, NULL);
	if (SPI_processed == 0)
		elog(ERROR, "VM \"%s\" was not adopted", vm_id);
	*id = *DatumGetUUIDP(db_value(0, 1, &isnull));
	team_id = db_text(0, 2, CurrentMemoryContext);
	wake_workers(LANE_HTTP, DatumGetTimestampTz(db_value(0, 3, &isnull)));
	event_add(id, team_id, "state", NULL, "ready", "adopted",
			  handle_set_text(NULL, "vm_id", vm_id));
	db_leave(&scope);
	PG_RETURN_UUID_P(id);
}

Datum
agentvm_release_quarantine(PG_FUNCTION_ARGS)
{
	DbScope scope;
	Datum values[1] = {(Datum) 0};
	int released;

	require_admin("release the quarantine");
	if (!identity_permits("agentvm.release_quarantine()"))
		PG_RETURN_INT32(0);
	db_enter(&scope);
	db_run(&lock_query, values, "n");
	db_run(&release_query, NULL, NULL);
	released = (int) SPI_processed;
	db_run(&all_due_query, NULL, NULL);
	db_run(&over_query, NULL, NULL);
	wake_workers(LANE_ALL, GetCurrentTimestamp());
	db_leave(&scope);
	PG_RETURN_INT32(released);
}

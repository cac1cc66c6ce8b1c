/*-------------------------------------------------------------------------
 *
 * provider.h
 *		The whole contract between the engine and a provider of VMs.
 *
 * A provider is a const struct of capability flags and two functions: one that
 * checks options, and one that takes an operation one step further.  A step is
 * pure: it looks at the session, its options, its decrypted credentials, the
 * progress it kept itself (the handle) and the last reply, and says what to do
 * next.  It never touches the network or the database, so that the engine can
 * commit the new handle before the request leaves: any worker, after any
 * crash, is able to carry on by calling the step again with the handle and no
 * reply.
 *
 * A step runs inside a transaction and a subtransaction; it may raise, which
 * counts as CLASS_PERMANENT.  Everything it returns is palloc'd in
 * CurrentMemoryContext and lives until the step has been recorded.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_PROVIDERS_PROVIDER_H
#define AGENTVM_PROVIDERS_PROVIDER_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "net/http.h"
#include "providers/blocking.h"
#include "providers/error_class.h"
#include "secret/secret.h"
#include "utils/jsonb.h"

#define AVM_PROVIDER_ABI 4

/*
 * Member of the handle of a placed provider, of any value: something of the
 * session is on its host, or may be.  It is to be there from the step on that
 * asks for the first launch; as long as it is, or a VM is known, the host keeps
 * its uri and directory.
 */
#define AVM_HOST_USED "host_used"

/*
 * Member of the handle, of any value: there is something that only the VM's boot
 * needed.  Once its runtime has reported OP_TIDY takes it away, and with it the
 * member; if the session ends before, OP_TERMINATE does.
 */
#define AVM_BOOT_LEFT "boot_left"

/*
 * Member of the handle, of any value: a call that pauses or resumes the VM may have
 * taken effect.  As long as it is there, that operation is not given up.
 */
#define AVM_POWER_SENT "power_sent"

typedef enum ProviderOp
{
	OP_PROVISION, /* make the VM and see it running */
	OP_TERMINATE, /* end it; a VM that is gone already is success */
	OP_INSPECT,	  /* what the provider says now; result is jsonb */
	OP_CHECK,	  /* are the credentials good? read-only; result is jsonb; no session */
	OP_TIDY,	  /* take away what AVM_BOOT_LEFT tells of; never ends a session */
	OP_PAUSE,	  /* halt the VM in a way that OP_RESUME undoes, and see it halted */
	OP_RESUME,	  /* let it go on, and see it running */
	/*
	 * Of a provider that lists: tell of all VMs that carry our tag, ended ones included, or
	 * (context->vm_ids) of those alone, whatever they carry; read-only; no session.  Each
	 * step's result, also of one with another request, is an array of objects with the
	 * texts vm_id, state ("pending", "running", "stopping", "stopped", "shutting-down",
	 * "terminated"), and where known session_id, team_id, agent_id (as the tags have them),
	 * launched_at, address, purchase, reason_code and reason (of an end).
	 */
	OP_LIST,
	/*
	 * End the VMs that context->vm_ids names, as far as they carry our tag, and take away what
	 * was kept outside of them for the sessions of context->vm_sessions; no session; result as
	 * above.
	 */
	OP_REAP
} ProviderOp;

/* The session as a provider sees it. Strings are NULL where not known. */
typedef struct ProviderSession
{
	const char *session_id; /* uuid text */
	const char *team_id;
	const char *agent_id;
	const char *cluster; /* installation uuid: value of the tag agentvm-cluster */
	const char *vm_id;	 /* as the provider told it */
	const char *region;
	const char *address;
	const char *purchase; /* "spot" or "on-demand" */
	int attempt;		  /* launch attempts made so far, 1 before the first */
	int vcpus;			  /* 0: the provider's default */
	int memory_mib;
	int disk_gib;
	bool runtime;			 /* the VM runs agentvm-runtime and will bootstrap */
	bool warm;				 /* it waits for a provision() that takes it */
	const char *boot_key_id; /* with runtime: key for keyring_bootstrap_token() */
	TimestampTz created_at;
	TimestampTz launched_at; /* 0: not yet */
	TimestampTz ready_at;	 /* 0: not yet; may come before launched_at, by the VM's own report */
	TimestampTz deadline_at;
	TimestampTz
		ceiling_at; /* no extend() ever goes beyond; the VM's own hard stop is this + grace */
} ProviderSession;

/* A machine of ours that runs VMs: a row of agentvm.host. */
typedef struct ProviderHost
{
	const char *name;
	const char *uri;	   /* "qemu:///session" */
	const char *directory; /* on that machine: disks and sockets of its VMs */
	const char *accel;	   /* "auto", "kvm" or "tcg" */
	int kvm; /* whether a guest has been seen to run under KVM there: 1, 0, -1 not known */
} ProviderHost;

/* A profile that a team may use. */
typedef struct ProviderProfile
{
	const char *name;
	Jsonb *options;
} ProviderProfile;

#define AVM_MAX_LISTED 100 /* VMs that one OP_LIST or OP_REAP names */

typedef struct ProviderContext
{
	ProviderOp op;
	const ProviderSession *session; /* NULL for OP_CHECK, OP_LIST, OP_REAP */
	const ProviderHost
		*host; /* of a placed provider: where the VM is, or is to be; NULL: nowhere yet */
	const char
		*cluster;		/* installation uuid, where there is no session; else it is the session's */
	const char *region; /* OP_LIST, OP_REAP: where; of a placed provider it is the host */
	List *vm_ids;		/* OP_LIST, OP_REAP: of char *, at most AVM_MAX_LISTED */
	List *vm_sessions;	/* OP_REAP: of char *, sessions of such VMs that have no live row */
	Jsonb *options;		/* merged: team, then profile, then caller; frozen at provision() */
	const SecretSet *secrets; /* what calls are signed with: of the team, or of its login */
	bool
		login_pending; /* a login has yet to bring them: a request is not sent, but asked for again */
	const char *external_id; /* of the team */
	Jsonb *handle;			 /* progress that the last step kept, or NULL */
	const HttpReply *reply; /* answer to the last step's request; NULL: (re)start from the handle */
	TimestampTz now;
	bool
		ending; /* OP_PROVISION, OP_PAUSE, OP_RESUME: the session is to end: begin nothing new, just take
				 * in the reply */
	List *profiles; /* OP_CHECK: of ProviderProfile, by name: those of the provider that the team
					 * may use */
} ProviderContext;

typedef enum StepKind
{
	STEP_REQUEST, /* commit the handle, then send step->request, then call again with its reply */
	STEP_WAIT,	  /* commit the handle, call again without reply after wait_ms */
	STEP_DONE,	  /* the operation has succeeded */
	STEP_FAILED	  /* it has not; error_class tells what may be tried */
} StepKind;

/*
 * What a cloud account grants of a call, and whether it can be made for several
 * sessions at once.  The texts are shown to administrators: no secret is in them.
 */
typedef struct CallRate
{
	const char *bucket; /* of an account's calls those with the same text draw on the same grant */
	const char
		*account; /* whose: its number, or a name of its own for what the call is signed with */
	int burst;	  /* calls at once */
	double per_second; /* and from then on */
	/* of a call that Provider.join can make for several members, else NULL: */
	const char *batch;	/* the same for those that may be made in one, less than 100 bytes */
	const char *member; /* whom this one is for */
	int limit;			/* members of one call at most */
} CallRate;

typedef struct ProviderStep
{
	StepKind kind;
	HttpRequest *request; /* STEP_REQUEST */
	CallRate *rate;		  /* of the request; NULL: no limit is known */
	const char *
		operation; /* the provider's name for the call just answered or to be made: "RunInstances" */
	bool mutates;  /* STEP_REQUEST: the call changes something (an event row is written for it) */
	int wait_ms;   /* STEP_WAIT */
	ErrorClass
		error_class; /* STEP_FAILED; also set (kind != FAILED) when the reply was bad but the step goes on */
	const char *error_code; /* with error_class */
	const char *error_message;
	Jsonb *tried;  /* what the call just answered was for, an object for its event; or NULL */
	Jsonb *handle; /* new progress; NULL: unchanged */
	int attempt;   /* > 0: this launch attempt begins; its bootstrap token is committed with it */
	bool running;  /* the VM runs (OP_PROVISION) */
	bool was_gone; /* STEP_DONE of OP_TERMINATE: it had ended before anybody asked for that */
	/* facts learned; NULL: unchanged */
	const char *vm_id;
	const char *region;
	const char *address;
	const char *purchase;
	const char *account; /* the number of the one that the call just answered was made in */
	int host_kvm; /* learned of the host: 1 guests run under KVM there, -1 they do not, 0 nothing */
	Jsonb *result; /* OP_INSPECT, OP_CHECK when done; OP_LIST, OP_REAP: see there */
} ProviderStep;

/*
 * A login: temporary credentials that a provider gives for what a team has, such as
 * an assumed role.  The engine makes it by HTTP, once for all sessions that need the
 * same one, and keeps it in memory until shortly before it expires (engine/login.h).
 */
typedef struct LoginContext
{
	ProviderOp op;			  /* what it is for */
	const char *session_id;	  /* the session that has asked first, or NULL */
	const char *cluster;	  /* installation uuid */
	const char *external_id;  /* of the team */
	Jsonb *options;			  /* merged options of the session; of the team for OP_CHECK */
	Jsonb *team_options;	  /* the team's own, as they are now; may be NULL */
	const SecretSet *secrets; /* the team's own or the server's; or what login "via" has brought */
	const char *via;		  /* key of that login, NULL: none yet */
	TimestampTz now;
} LoginContext;

typedef struct LoginStep
{
	StepKind kind;			/* not STEP_WAIT */
	HttpRequest *request;	/* STEP_REQUEST */
	const char *operation;	/* of the call answered, or to be made */
	SecretSet *secrets;		/* STEP_DONE */
	TimestampTz good_until; /* STEP_DONE: not to be used for new calls after that */
	ErrorClass error_class; /* STEP_FAILED */
	const char *error_code;
	const char *error_message;
	const char *error_hint; /* or NULL */
} LoginStep;

/* Where options are about to be used; decides which are known and required. */
typedef enum OptionScope
{
	OPTIONS_TEAM,	 /* set_provider: part of them is enough */
	OPTIONS_PROFILE, /* create_profile */
	OPTIONS_CALLER,	 /* provision(options): only what is safe for callers */
	OPTIONS_LAUNCH	 /* all merged, about to launch: nothing may be missing */
} OptionScope;

/* One option or secret that a provider knows. */
typedef struct ProviderOption
{
	const char *name;
	char
		type; /* 's' string, 'b' boolean, 'i' integer, 'd' duration (interval text or seconds), 'l' list of strings */
	bool caller;	  /* a caller of provision() may set it */
	const char *help; /* for error hints and README */
} ProviderOption;

typedef struct Provider
{
	int abi; /* AVM_PROVIDER_ABI */
	const char *name;
	const ProviderOption *options; /* ends with a NULL name */
	const ProviderOption *secrets; /* ends with a NULL name */
	bool runtime_default;		   /* profile.runtime when nobody says */
	bool needs_secrets;			   /* provision() refuses a team that has none */
	bool placed; /* its VMs run on rows of agentvm.host; OP_CHECK is asked once for each of them */
	bool lists;	 /* it has OP_LIST and OP_REAP */
	/*
	 * Pairs of options that say the same in two ways, up to a pair of NULLs; may be NULL.
	 * One that a profile or a caller sets takes the place of the other one, too.
	 */
	const char *const (*alternatives)[2];
	/*
	 * Of a provider whose library blocks, else NULL: make the call that a step has
	 * asked for (STEP_REQUEST).  Runs on a thread of a runner (engine/threads.c):
	 * no PostgreSQL API, no palloc, no elog, no signals, several at once.
	 */
	void (*perform)(const BlockingCall *call, BlockingReply *reply);
	/*
	 * Check values beyond names and types, which the core has checked already.
	 * Raises AV010 with the option's name; never changes anything.
	 */
	void (*validate)(OptionScope scope, Jsonb *options);
	/*
	 * Raise what would keep a session with these options from being launched
	 * and can be told without a call (AV010, AV012), at provision(); may be NULL.
	 */
	void (*check_launch)(Jsonb *options, bool runtime);
	/*
	 * Raise what keeps this session, which is ready, from being paused (0A000), or
	 * says that it is not known yet (AV007); makes no call.  NULL: the provider cannot
	 * pause, and is never asked for OP_PAUSE and OP_RESUME.
	 */
	void (*check_pause)(const ProviderSession *session, Jsonb *options);
	/*
	 * Of a provider whose credentials may have to be fetched first; else all three are
	 * NULL.  The login that is needed beyond context->secrets, as a palloc'd text that is the
	 * same only for logins that may stand for each other (it may hold a hash of the
	 * secrets, but no secret); NULL: context->secrets are what signs.  Makes no call.
	 */
	char *(*login_needed)(const LoginContext *context);
	/*
	 * Take that login one step further; fills *step, which comes zeroed.  "reply"
	 * answers the last step's request, NULL: begin.  "kept" keeps what later steps need:
	 * it and what is allocated live until the login has come or failed.
	 */
	void (*login_step)(const LoginContext *context, const HttpReply *reply, SecretSet *kept,
					   LoginStep *step);
	/* Whether a reply says that what the call was signed with has expired. */
	bool (*login_expired)(const HttpReply *reply);
	/*
	 * Of a provider whose steps give CallRate.batch, else both are NULL.  The request for
	 * all the members, like "request", which is that of one of them.
	 */
	HttpRequest *(*join)(const HttpRequest *request, const char *const *members, int count);
	/*
	 * What the reply to that says to each member alone, as if it had asked for itself;
	 * replies[] comes as NULLs.  What stays NULL was refused because of others: the engine
	 * asks again without those that have a reply, or, where nobody has, in halves.  Returns how
	 * the call was answered.  Outside a transaction.
	 */
	ErrorClass (*split)(const HttpReply *reply, const char *const *members, int count,
						HttpReply **replies);
	/* Take the operation one step further; fills *step, which comes zeroed. */
	void (*step)(const ProviderContext *context, ProviderStep *step);
} Provider;

/* ---- registry (registry.c) ---- */

/*
 * Make a provider known in this process; called from a library's _PG_init.
 * The struct must stay valid for ever.  Raises AV010 for another ABI version,
 * a bad name, or a name that is taken by a different provider.
 */
extern PGDLLEXPORT void agentvm_register_provider(const Provider *provider);

/*
 * The provider of that name, loading agentvm.provider_libraries on first use.
 * Raises AV010 that lists the known names when there is none.
 */
extern const Provider *provider_get(const char *name);

/* The same without raising: NULL when unknown. */
extern const Provider *provider_find(const char *name);

/* The names (char *) of the known providers that list VMs, of those that are placed or the others. */
extern List *provider_names_listing(bool placed);

/*
 * Check option names and types for a scope, then the provider's own rules.
 * "options" must be a jsonb object.  Raises AV010 naming the option and listing
 * the known ones, with the caller's statement and context kept out of the log.
 */
extern void provider_check_options(const Provider *provider, OptionScope scope, Jsonb *options);

/*
 * The options of "below" (NULL: none), a team's, say, overridden by those of "above" (NULL:
 * none), a profile's: both jsonb objects, either of which may be what is returned.
 */
extern Jsonb *provider_merge_options(const Provider *provider, Jsonb *below, Jsonb *above);

/* ---- reading options (options.c) ---- */

/* Text of a string, number or boolean member, or NULL. Palloc'd. */
extern PGDLLEXPORT char *option_text(Jsonb *options, const char *name);

/* A boolean member, or the default. */
extern PGDLLEXPORT bool option_bool(Jsonb *options, const char *name, bool fallback);

/* An integer member, or the default. */
extern PGDLLEXPORT int option_int(Jsonb *options, const char *name, int fallback);

/* A duration in milliseconds (JSON number: seconds; string: interval), or the default. */
extern PGDLLEXPORT int64 option_ms(Jsonb *options, const char *name, int64 fallback);

/* Members of a list of strings, as a List of char *; a single string is a list of one. */
extern PGDLLEXPORT List *option_list(Jsonb *options, const char *name);

/* A member of any type, or NULL; points into "object" or is palloc'd. */
extern PGDLLEXPORT JsonbValue *option_value(Jsonb *object, const char *name);

/*
 * A copy of "object" ('{}' when NULL) with one member set to a string (NULL
 * removes it), an integer, a boolean, or an object or array.  For handles and results.
 */
extern PGDLLEXPORT Jsonb *handle_set_text(Jsonb *object, const char *name, const char *value);
extern PGDLLEXPORT Jsonb *handle_set_bool(Jsonb *object, const char *name, bool value);
extern PGDLLEXPORT Jsonb *handle_set_document(Jsonb *object, const char *name, Jsonb *value);
extern PGDLLEXPORT Jsonb *handle_set_int(Jsonb *object, const char *name, int64 value);

/* A member of a handle: a string, or with text NULL an integer. */
typedef struct HandleMember
{
	const char *name;
	const char *text;
	int64 number;
} HandleMember;

/* A whole handle at once, in CurrentMemoryContext. */
extern PGDLLEXPORT Jsonb *handle_make(const HandleMember *members, int count);

/* Integer member of a handle, or the default. */
extern PGDLLEXPORT int64 handle_int(Jsonb *object, const char *name, int64 fallback);

extern const Provider noop_provider;
extern const Provider ec2_provider;

#endif /* AGENTVM_PROVIDERS_PROVIDER_H */
